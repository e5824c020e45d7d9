"""What every backbone of the registry does. A new one is tested by its row of `specimens.SMALL`."""

import collections
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend import core
from specimens import SMALL, answer, drawn, error, inputs, jitted, shapes

from ldm_jax.models import BACKBONES, weights
from ldm_jax.models.flops import traced_flops
from ldm_jax.models.names import STACK, current_key, entries, flatten
from ldm_jax.models.networks import KINDS, described, make_network
from ldm_jax.nn.stack import Stack

START_AT_ZERO = {"unet", "pixart"}  # what they answer
CONCATENATE = {"unet", "uvit"}  # latents beside the noisy ones
STATISTICS = {"reduce_sum", "reduce_max", "exp", "rsqrt"}

every_backbone = pytest.mark.parametrize("name", BACKBONES)
every_form = pytest.mark.parametrize("name", SMALL)


def close(given, expected):
    compare = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    jax.tree.map(compare, given, expected)


def rows(tree, order):
    return jax.tree.map(lambda array: array[np.array(order)], tree)


@functools.cache
def trainer(config):
    """(params, x, told, cond) -> ((loss, answer), gradient), with all of the text to be seen."""
    apply = make_network(config).apply

    @jax.jit
    def gradient(params, x, told, cond):
        def loss(params):
            y = answer(apply, params, x, told, cond._replace(mask=None))
            return jnp.mean(jnp.square(y - x)), y

        return jax.value_and_grad(loss, has_aux=True)(params)

    return gradient


@every_form
def test_latents_of_any_size_that_it_can_divide_keep_their_shape_and_are_float32(name):
    config = dataclasses.replace(SMALL[name], dtype="bfloat16")
    predict, like = functools.partial(answer, make_network(config).apply), shapes(config)
    _, told, cond = inputs(config)
    short = cond._replace(tokens=cond.tokens[:, :2], mask=cond.mask[:, :2])
    for height, width, given in ((4, 4, cond), (1, 5, short), (2, 3, cond._replace(mask=None))):
        size = height * config.multiple, width * config.multiple
        x = jax.ShapeDtypeStruct((3, *size, config.in_channels), jnp.float32)
        y = jax.eval_shape(predict, like, x, told, given)
        assert (y.shape, y.dtype) == ((3, *size, config.predicted_channels), jnp.float32)


@every_form
def test_statistics_of_a_bfloat16_network_are_float32(name):
    """Means, variances and softmaxes; the products of matrices may be whatever the dtype is."""
    config = dataclasses.replace(SMALL[name], dtype="bfloat16")
    traced = jax.make_jaxpr(functools.partial(answer, make_network(config).apply))
    seen = collections.defaultdict(set)
    pending = [traced(shapes(config), *inputs(config)).jaxpr]
    while pending:
        for equation in pending.pop().eqns:
            seen[equation.primitive.name].add(str(equation.outvars[0].aval.dtype))
            pending += core.jaxprs_in_params(equation.params)
    assert seen.keys() >= STATISTICS and "bfloat16" in seen["dot_general"]
    assert all(seen[primitive] == {"float32"} for primitive in STATISTICS), seen


@every_backbone
def test_bfloat16_stays_near_float32(name):
    params, apply = drawn(SMALL[name])
    half = jitted(dataclasses.replace(SMALL[name], dtype="bfloat16"))
    given, expected = (answer(f, params, *inputs(SMALL[name])) for f in (half, apply))
    assert given.dtype == jnp.float32
    assert error(given, expected) < 0.05


@every_backbone
def test_an_example_is_answered_alone_as_it_is_among_others(name):
    params, apply = drawn(SMALL[name])
    given = inputs(SMALL[name])
    together = answer(apply, params, *given)
    for i in range(3):
        close(answer(apply, params, *rows(given, [i])), together[i : i + 1])


@every_backbone
def test_the_text_is_prepared_once_a_prompt_and_taken_for_any_image(name):
    """Every array of a context has the batch first, so that it is gathered and sharded like the prompts."""
    params, apply = drawn(SMALL[name])
    x, told, cond = inputs(SMALL[name])
    order = [2, 0, 0]
    full = cond._replace(concat=x) if name in CONCATENATE else cond
    context = apply(params, full, method="prepare")
    close(rows(context, order), apply(params, rows(full, order), method="prepare"))
    seeing = apply(params, cond._replace(mask=np.ones_like(cond.mask)), method="prepare")
    (_, at_once), _ = trainer(SMALL[name])(params, x, told, rows(cond, order))
    close(apply(params, x, told, rows(seeing, order)), at_once)


@every_backbone
def test_latents_time_and_text_count_but_no_token_behind_the_mask(name):
    params, apply = drawn(SMALL[name])
    x, told, cond = inputs(SMALL[name])
    first = answer(apply, params, x, told, cond)
    hidden = np.where(cond.mask[:, :, None], cond.tokens, 7.0)
    close(answer(apply, params, x, told, cond._replace(tokens=hidden)), first)
    others = (
        (-x, told, cond),
        (x, told + 1, cond),
        (x, told, cond._replace(tokens=-cond.tokens)),
        (x, told, cond._replace(mask=~cond.mask)),
    )
    for other in others:
        moved = np.abs(answer(apply, params, *other) - first)
        assert np.all(np.max(moved, axis=(1, 2, 3)) > 1e-3 * np.max(np.abs(first)))


@every_backbone
def test_concatenated_latents_are_further_channels_of_the_input(name):
    config = SMALL[name]
    wide, apply_wide = drawn(dataclasses.replace(config, in_channels=6))
    x, told, cond = inputs(config)

    def beside(concat):
        return answer(apply_wide, wide, x, told, cond._replace(concat=concat))

    def of_four(like, leaf):
        if leaf.shape == like.shape:
            return leaf
        return leaf.reshape(-1, 6, leaf.shape[-1])[:, :4].reshape(like.shape)

    if name not in CONCATENATE:
        with pytest.raises(ValueError, match="no input for latents"):
            beside(x[..., 2:])
        return
    narrow = jax.tree.map(of_four, shapes(config), wide)
    expected = answer(jitted(config), narrow, x, told, cond)
    close(beside(np.zeros_like(x[..., 2:])), expected)
    assert error(beside(x[..., 2:]), expected) > 1e-2


@every_backbone
def test_scanned_blocks_are_blocks_one_after_another(name, monkeypatch):
    depths = []

    def layers(stack, each=None):
        graph, state = nnx.split(stack.block)
        depths.append(len(jax.tree.leaves(state)[0]))
        for i in range(depths[-1]):
            layer, own = rows((state, each), i)
            yield nnx.merge(graph, layer), own

    def stacked(outs):
        return jax.tree.map(lambda *layers: jnp.stack(layers), *outs)

    def scan(stack, call, x, each=None):
        outs = []
        for block, own in layers(stack, each):
            x, out = call(block, x, own)
            outs.append(out)
        return x, stacked(outs)

    def map_(stack, call):
        return stacked([call(block) for block, _ in layers(stack)])

    params, apply = drawn(SMALL[name])
    scanned = answer(apply, params, *inputs(SMALL[name]))
    monkeypatch.setattr(Stack, "scan", scan)
    monkeypatch.setattr(Stack, "map", map_)
    unrolled = jax.jit(functools.partial(answer, make_network(SMALL[name]).apply))
    assert error(unrolled(params, *inputs(SMALL[name])), scanned) < 1e-5
    assert min(depths) > 1


@every_backbone
def test_it_starts_as_it_says_and_every_parameter_can_leave_its_start(name):
    """Behind one zero after another: the last projection moves first, then what feeds it, then all.

    But for the bias of keys, which adds the same to all scores of a query, so softmax does not see it.
    """
    config = SMALL[name]
    key = jax.random.key(0, impl="rbg")  # whose draws compile in a third of the time
    params = before = jax.jit(make_network(config).init)(key)
    given = inputs(config)
    for step in range(4):
        (_, y), gradient = trainer(config)(params, *given)
        if not step:
            assert np.any(y) == (name not in START_AT_ZERO)
        params = jax.tree.map(lambda p, g: p - 0.01 * jnp.sign(g), params, gradient)

    after = flatten(params)

    def stays(path, leaf):
        layers = len(leaf) if f"/{STACK}/" in path else 1
        return np.any(np.all(np.reshape(leaf == after[path], (layers, -1)), axis=1))

    staying = {path for path, leaf in flatten(before).items() if stays(path, leaf)}
    assert all(path.endswith("to_k/bias") for path in staying), staying


@every_backbone
@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.slow)])
def test_rematerialisation_costs_work_but_changes_neither_answer_nor_gradient(name, remat):
    config = SMALL[name]
    params, given = drawn(config)[0], inputs(config)
    plain, again = (trainer(dataclasses.replace(config, remat=row)) for row in ("none", remat))
    assert traced_flops(again, params, *given) > traced_flops(plain, params, *given)
    close(again(params, *given), plain(params, *given))


@every_form
def test_it_survives_the_way_through_our_files(name, tmp_path):
    config = SMALL[name]
    params, _ = drawn(config)
    (kind,) = {kind for kind in KINDS.values() if kind.config is type(config)}
    weights.save(tmp_path, params, kind.names(config), kind.write(config))
    assert described(tmp_path) == (kind, config)
    again = weights.load(tmp_path, shapes(config), kind.names(config))
    jax.tree.map(np.testing.assert_array_equal, again, params)
    computed = {"dtype": "bfloat16", "remat": "full"}
    read = kind.read(weights.read_config(tmp_path), **computed)
    assert read == dataclasses.replace(config, **computed)


@every_form
def test_every_layer_of_a_parameter_is_one_tensor_of_a_checkpoint_and_is_found_again(name):
    like, names = shapes(SMALL[name]), SMALL[name].names
    found = entries(like, names)
    assert len({(entry.path, entry.layer) for entry in found}) == len(found)
    assert len({current_key(entry.key, names) for entry in found}) == len(found)
    assert all(current_key(entry.key, names) == entry.key for entry in found)
    sizes = [leaf.size for leaf in jax.tree.leaves(like)]
    assert sum(math.prod(entry.shape) for entry in found) == sum(sizes)


@every_backbone
def test_every_row_of_its_table_of_names_is_needed(name):
    forms = [(c.names, shapes(c)) for c in SMALL.values() if type(c) is BACKBONES[name]]
    for table in {table for table, _ in forms}:
        likes = [like for own, like in forms if own == table]
        for field in ("renames", "pointwise"):
            for row in getattr(table, field):
                fewer = tuple(other for other in getattr(table, field) if other != row)
                lacking = dataclasses.replace(table, **{field: fewer})
                assert any(entries(like, lacking) != entries(like, table) for like in likes), row
