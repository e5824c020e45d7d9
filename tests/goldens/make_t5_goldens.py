"""Writes the t5 and t5_tokenizer directories beside this file: transformers' small T5 encoder, tokenizer, and answers.

`t5` is a directory as `save_pretrained` writes it, with every weight drawn at random, and an `outputs.npz` with inputs
and outputs. `t5_tokenizer` holds a `spiece.model` of SentencePiece's, the files that transformers makes of it, and the
ids and masks that transformers gives to captions. Needs torch, transformers, sentencepiece and protobuf:

    python tests/goldens/make_t5_goldens.py
"""

import contextlib
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

# Heads that do not divide the width, and fewer layers than any other dimension.
CONFIG = {
    "vocab_size": 30,
    "d_model": 8,
    "d_kv": 6,
    "d_ff": 20,
    "num_layers": 2,
    "num_heads": 3,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
# Captions of three lengths, among them one on both sides of relative_attention_max_distance, 128.
LENGTHS = (139, 70, 1)

TEXT = """
a red green blue small large circle square triangle left right above below the of is striped dotted
background white yellow purple tiny huge next to it's 42 café naïve !
"""
WORDS = TEXT.split()
# What becomes what before the text is cut up, in the form of SentencePiece's rules: hexadecimal code points.
RULES = {
    "\t": " ",
    "\n": " ",
    "\u00a0": " ",
    "\u3000": " ",
    "\u200b": "",
    "e\u0301": "é",
    "ﬁ": "fi",
}
WIDE = {letter: letter + 0xFEE0 for letter in range(0x21, 0x7F)}  # the forms of full width
RULES |= {chr(wide): chr(letter) for letter, wide in WIDE.items()}
CAPTIONS = [
    "",
    "   ",
    "a red circle above the blue square",
    "A RED Circle!!  of   a  square ",
    "cafe\u0301 café naïve, ﬁne",
    "tab\tnew\nline\u00a0nbsp\u3000wide a\u200bb",
    "full width 42".translate(WIDE),
    "日本語 🙂",
    "end </s> and <pad> and <unk> inside</s>",
    "<extra_id_0> <extra_id_4>x",
    "▁ ▁▁a",
    "the " * 15,
    "the " * 16,
    " ".join(WORDS),
]


def draw_weights(model: torch.nn.Module) -> None:
    """Normal weights that keep the variance, and slopes near 1."""
    for name, parameter in model.named_parameters():
        slope = "norm" in name and name.endswith("weight")
        std = 0.3 if slope else 1.0 if "bias" in name else parameter.shape[-1] ** -0.5
        parameter.data.normal_(1.0 if slope else 0.0, std)


@torch.no_grad()
def write(directory: Path, seed: int) -> None:
    """The encoder, and what it answers where captions are padded."""
    torch.manual_seed(seed)
    model = transformers.T5EncoderModel(transformers.T5Config(**CONFIG))
    draw_weights(model)
    model.eval().save_pretrained(directory / "t5")
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, CONFIG["vocab_size"], (len(LENGTHS), max(LENGTHS)))
    mask = np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]
    given = {"tokens": np.where(mask, tokens, 0).astype(np.int32), "mask": mask}
    ids, seen = (torch.from_numpy(array).long() for array in given.values())
    last = model(input_ids=ids, attention_mask=seen).last_hidden_state.numpy()
    np.savez(directory / "t5" / "outputs.npz", **given, last=last)


def write_tokenizer(directory: Path, seed: int) -> None:
    """A vocabulary learned from random captions, and the ids and masks of CAPTIONS."""
    import sentencepiece  # which nothing else here needs

    shutil.rmtree(directory, ignore_errors=True)  # transformers would read an old tokenizer.json
    directory.mkdir()
    rng = np.random.default_rng(seed)
    rules = "".join(f"{_code_points(a)}\t{_code_points(b)}\n" for a, b in RULES.items())
    with contextlib.chdir(directory):  # the model holds the paths that it was trained with
        Path("rules.tsv").write_text(rules)
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([" ".join(rng.choice(WORDS, 8)) for _ in range(300)]),
            model_prefix="spiece",
            vocab_size=120,
            hard_vocab_limit=False,
            normalization_rule_tsv="rules.tsv",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
        )
        for file in ("rules.tsv", "spiece.vocab"):
            Path(file).unlink()
    tokenizer = transformers.T5Tokenizer.from_pretrained(
        directory, extra_ids=5, model_max_length=16
    )
    tokenizer.save_pretrained(directory)
    answer = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="np")
    np.savez_compressed(
        directory / "outputs.npz",
        captions=np.array(CAPTIONS),
        tokens=answer["input_ids"].astype(np.int32),
        mask=answer["attention_mask"].astype(bool),
    )


def _code_points(text: str) -> str:
    return " ".join(f"{ord(character):X}" for character in text)


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    write(here, seed=0)
    write_tokenizer(here / "t5_tokenizer", seed=0)
