import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.nn import attention as module
from ldm_jax.nn.attention import attention


def draw(num_queries=5, num_keys=7, dtype=jnp.float32):
    shapes = ((2, num_queries, 3, 8), (2, num_keys, 3, 8), (2, num_keys, 3, 8))
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(0, 3, shape), dtype) for shape in shapes]


def softmax_attention(q, k, v, seen, bias=0.0, scale=8**-0.5):
    """The formula in float64; `seen` is [B, N, L], and heads are 8 wide."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    score = np.einsum("BNKA,BLKA->BKNL", q, k) * scale + bias
    weight = np.exp(score - score.max(-1, keepdims=True)) * seen[:, None]
    return np.einsum("BKNL,BLKA->BNKA", weight / weight.sum(-1, keepdims=True), v)


MASK = np.array([[1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 1, 1]], bool)
BIAS = np.random.default_rng(1).normal(0, 3, (2, 3, 5, 7)).astype(np.float32)
ALL, MASKED = np.ones((2, 5, 7)), np.broadcast_to(MASK[:, None], (2, 5, 7))
# What is seen, and everything that changes the scores.
CASES = {
    "everything": (ALL, {}, {}),
    "masked": (MASKED, {"mask": MASK}, {}),
    "causal": (np.broadcast_to(np.tri(5, 7), (2, 5, 7)), {"causal": True}, {}),
    "both": (np.tri(5, 7)[None] * MASKED, {"mask": MASK, "causal": True}, {}),
    "one bias": (MASKED, {"mask": MASK}, {"bias": BIAS[:1], "scale": 1.0}),
    "a bias each": (np.tri(5, 7)[None] * ALL, {"causal": True}, {"bias": BIAS}),
    "scaled": (ALL, {}, {"scale": 0.1}),
}


@pytest.mark.parametrize("case", CASES)
def test_attention_is_the_formula(case):
    seen, hidden, changed = CASES[case]
    q, k, v = draw()
    given = jax.jit(lambda q, k, v: attention(q, k, v, **hidden, **changed))(q, k, v)
    expected = softmax_attention(q, k, v, seen, **changed)
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_cudnn_is_asked_for_the_same(case, monkeypatch):
    """jax.nn's own implementation stands in for the one that needs a GPU; both take the same arguments."""
    theirs = jax.nn.dot_product_attention
    on_cpu = lambda *args, **options: theirs(*args, **{**options, "implementation": "xla"})  # noqa: E731
    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    seen, hidden, changed = CASES[case]
    q, k, v = draw()
    given = attention(q, k, v, **hidden, **changed, implementation="cudnn")
    expected = softmax_attention(q, k, v, seen, **changed)
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)


def answer_and_gradient(implementation, **options):
    call = functools.partial(attention, **options, implementation=implementation)
    loss = lambda q, k, v: jnp.sum(jnp.sin(call(q, k, v)))  # noqa: E731
    both = lambda q, k, v: (call(q, k, v), jax.grad(loss, argnums=(0, 1, 2))(q, k, v))  # noqa: E731
    return jax.jit(both)(*draw())


@pytest.mark.parametrize("case", [name for name in CASES if "bias" not in name])
def test_splash_is_the_same_interpreted(case):
    """The kernel of TPUs, on tokens that do not fill its blocks; and the gradient, which has a kernel of its own."""
    _, hidden, changed = CASES[case]
    given, expected = (answer_and_gradient(x, **hidden, **changed) for x in ("splash", "xla"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), given, expected)


def test_splash_is_the_same_on_every_device_of_a_mesh():
    with jax.set_mesh(a_mesh(data=2, tensor=3)):
        given = answer_and_gradient("splash", mask=MASK)
    expected = answer_and_gradient("xla", mask=MASK)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), given, expected)
    assert given[0].sharding.spec[0] == "data"


def test_splash_takes_no_bias():
    with pytest.raises(ValueError, match="a bias has no implementation 'splash'"):
        attention(*draw(), bias=BIAS, implementation="splash")


def test_chunks_are_the_whole_in_values_and_gradients(monkeypatch):
    """Of three queries each, the last one partly padding."""
    monkeypatch.setattr(module, "CHUNK", 21)
    given, expected = (answer_and_gradient(name) for name in ("chunked", "xla"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), given, expected)


@pytest.mark.parametrize("hidden", [{"mask": MASK}, {"bias": BIAS}, {"causal": True}])
def test_chunks_are_for_queries_that_see_all_keys_alike(hidden):
    with pytest.raises(ValueError, match="'chunked' takes no mask and no bias"):
        attention(*draw(), **hidden, implementation="chunked")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_rounds_only_inputs_weights_and_result(dtype):
    q, k, v = draw(num_keys=64, dtype=dtype)
    given = jax.jit(attention)(q, k, v)
    assert given.dtype == dtype
    expected = softmax_attention(q, k, v, np.ones((2, 5, 64)))
    scale = np.max(np.abs(expected))
    assert (
        np.max(np.abs(np.asarray(given, np.float64) - expected)) < 2 * jnp.finfo(dtype).eps * scale
    )


def test_huge_scores_pick_one_key():
    q, k, v = draw()
    given = jax.jit(attention)(1e4 * q, 1e4 * k, v)
    np.testing.assert_allclose(given, softmax_attention(1e4 * q, 1e4 * k, v, np.ones((2, 5, 7))))


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_another_implementation(case):
    seen, hidden, changed = CASES[case]
    learned = {"bias": jnp.asarray(changed["bias"])} if "bias" in changed else {}
    fixed = {name: value for name, value in changed.items() if name != "bias"}

    def gradient(attend, **options):
        def loss(learned, q, k, v):
            return jnp.sum(jnp.sin(attend(q, k, v, **learned, **options, **fixed)))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(learned, *draw())

    given = gradient(attention, **hidden)
    expected = gradient(jax.nn.dot_product_attention, mask=jnp.asarray(seen, bool)[:, None])
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, given, expected)


def test_a_row_with_nothing_to_see_is_finite():
    q, k, v = draw()
    mask = jnp.zeros((2, 7), bool)
    value_and_grad = jax.value_and_grad(lambda q: jnp.sum(attention(q, k, v, mask=mask)))
    assert all(np.all(np.isfinite(x)) for x in jax.jit(value_and_grad)(q))


@pytest.fixture
def taken(monkeypatch):
    """Which implementation is called; none is run."""

    def call(q, k, v, **options):
        marked = []
        for name in module.IMPLEMENTATIONS:
            row = lambda q, *_, name=name: marked.append(name) or q  # noqa: E731
            monkeypatch.setitem(module.IMPLEMENTATIONS, name, row)
        jax.eval_shape(lambda q, k, v: attention(q, k, v, **options), q, k, v)
        (name,) = marked
        return name

    return call


def test_auto_takes_splash_on_tpus_for_many_tokens(taken, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    many = draw(1024, 1024, jnp.bfloat16)
    assert taken(*many) == "splash"
    assert taken(*many, bias=jnp.zeros((1, 3, 1024, 1024))) == "xla"
    assert taken(*draw(1024, 77, jnp.bfloat16)) == "splash"
    assert taken(*draw(77, 1024, jnp.bfloat16)) == "xla"
    assert taken(*draw(1024, 1024)) == "xla"
    monkeypatch.setattr(jax, "device_count", lambda: 4)  # among which no kernel can be divided
    assert taken(*many) == "xla"


def test_auto_takes_chunks_on_one_cpu_for_many_scores(taken, monkeypatch):
    assert taken(*draw(512, 512)) == "xla"  # on the eight devices of these tests
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert taken(*draw(512, 512)) == taken(*draw(4096, 77)) == "chunked"
    assert taken(*draw(256, 256)) == taken(*draw(512, 512), causal=True) == "xla"
    assert taken(*draw(512, 512), mask=np.ones((2, 512), bool)) == "xla"


def a_mesh(**sizes):
    types = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types)


def test_the_platform_of_the_mesh_in_force_has_the_last_word(taken, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with jax.set_mesh(a_mesh(data=2)):
        assert taken(*draw(1024, 1024, jnp.bfloat16)) == "xla"


@pytest.mark.parametrize(
    ("sizes", "chosen"),
    [
        ({"data": 2}, "splash"),
        ({"fsdp": 2, "tensor": 3}, "splash"),
        ({"data": 4}, "xla"),
        ({"tensor": 2}, "xla"),
        ({"other": 2}, "xla"),
    ],
)
def test_splash_is_taken_where_examples_and_heads_divide_over_the_mesh(
    sizes, chosen, taken, monkeypatch
):
    monkeypatch.setattr(module, "platform", lambda: "tpu")
    with jax.set_mesh(a_mesh(**sizes)):
        assert taken(*draw(1024, 77, jnp.bfloat16)) == chosen


def test_splash_refuses_a_mesh_that_does_not_divide_it():
    refused = "2 examples and 3 heads does not divide over the mesh {'data': 4}"
    with jax.set_mesh(a_mesh(data=4)), pytest.raises(ValueError, match=refused):
        attention(*draw(), implementation="splash")


def test_auto_takes_cudnn_only_where_it_can_run(taken, monkeypatch):
    half, full = draw(dtype=jnp.bfloat16), draw()
    assert taken(*half) == "xla"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert taken(*half) == taken(*half, causal=True) == "cudnn"
    assert taken(*full, implementation="cudnn") == "cudnn"
    assert taken(*half, implementation="xla") == "xla"
    assert taken(*half, mask=MASK) == taken(*half, bias=BIAS) == taken(*full) == "xla"
    assert taken(*(x[..., :7] for x in half)) == "xla"


def test_unknown_implementations_are_refused():
    with pytest.raises(ValueError, match="'flash'; it can be auto, xla, chunked, cudnn, splash"):
        attention(*draw(), implementation="flash")
