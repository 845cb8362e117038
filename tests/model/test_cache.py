"""The bounded cache inside Transformers: every way of generating equals one forward over the whole text."""

import copy
import gc
import itertools

import foreign_decoders
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import KINDS, VOCABULARY, close_logits, config, model, tokens, whole
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache, TextStreamer

import fibattn
from fibattn import FibAttnConfig, FibAttnForCausalLM, InputError
from fibattn.model.cache import DynamicRingLayer, StaticRingLayer
from fibattn.model.streaming import stream

LENGTH = 70
CACHES = {
    "dynamic": lambda m: DynamicCache(config=m.config),
    "without a configuration": lambda m: DynamicCache(),
    "static": lambda m: StaticCache(config=m.config, max_cache_len=LENGTH),
}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def in_pieces(m, ids, lengths, cache, mask=None):
    """Logits of the text given in pieces of these lengths, then token by token."""
    ends = [0, *(end for end in itertools.accumulate(lengths) if end < ids.shape[1])]
    ends += range(ends[-1] + 1, ids.shape[1] + 1)
    logits = []
    for first, last in itertools.pairwise(ends):
        some = {} if mask is None else {"attention_mask": mask[:, :last], "position_ids": places(mask)[:, first:last]}
        logits.append(m(ids[:, first:last], past_key_values=cache, use_cache=True, **some).logits)
    return torch.cat(logits, 1)


def places(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)


def answer(m, ids, **how):
    return m.generate(ids, **{"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **how})


# ---- a text in pieces


@pytest.mark.parametrize("made", CACHES)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_equal_the_whole(kind, made):
    m, ids = model(kind), tokens(2, LENGTH)
    close_logits(in_pieces(m, ids, [17, 1, 30], CACHES[made](m)), whole(m, ids))


@pytest.mark.parametrize("made", CACHES)
@pytest.mark.parametrize(
    "shape",
    [{"window": 0, "kv_convolution": 4}, {"window": 1, "kv_convolution": 4}, {"window": 4, "kv_convolution": 8}],
    ids=str,
)
def test_a_convolution_that_reaches_farther_than_the_layer(made, shape):
    m, ids = model("sliding", **shape), tokens(1, LENGTH)
    right = whole(m, ids)
    close_logits(in_pieces(m, ids, [17, 1, 30], CACHES[made](m)), right)
    cache = DynamicCache(config=m.config)
    m(ids[:, :60], past_key_values=cache)
    cache.crop(-1)
    close_logits(m(ids[:, 59:], past_key_values=cache).logits, right[:, 59:])


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=5), st.sampled_from(["dynamic", "static"]))
def test_any_pieces(lengths, made):
    m, ids = model("learned mixture"), tokens(1, LENGTH)
    with torch.no_grad():
        close_logits(in_pieces(m, ids, lengths, CACHES[made](m)), whole(m, ids))


def test_every_remainder_around_the_wrap():
    m, ids = model("linear", num_hidden_layers=2, rungs=5), tokens(1, 40)
    reaches = [m.config.layer_reach(layer) for layer in range(2)]
    assert reaches == [4, 12]
    right = whole(m, ids)
    for prefill in range(10, 2 * 13 + 2):
        close_logits(in_pieces(m, ids, [prefill], DynamicCache(config=m.config)), right)


@pytest.mark.parametrize("made", CACHES)
@pytest.mark.parametrize("kind", ["linear", "mixture", "learned"])
def test_left_padding(kind, made):
    m, ids = model(kind), tokens(2, LENGTH)
    mask = torch.ones_like(ids)
    mask[0, :23] = 0
    ours = in_pieces(m, ids, [30, 1, 8], CACHES[made](m), mask)
    close_logits(ours[:1, 23:], whole(m, ids[:1, 23:]))
    close_logits(ours[1:], whole(m, ids[1:]))


def test_gradients_through_a_cached_piece():
    m, ids = model("linear"), tokens(1, 30)
    with torch.enable_grad():
        cache = DynamicCache(config=m.config)
        m(ids[:, :20], past_key_values=cache)
        cached = m(ids[:, 20:], past_key_values=cache).logits
        grad = torch.autograd.grad(cached.sum(), m.lm_head.weight)[0]
    assert grad.isfinite().all()
    close_logits(cached, whole(m, ids)[:, 20:])


# ---- generate


@pytest.mark.parametrize("kind", ["mixture", "learned mixture"])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"do_sample": True, "temperature": 2.0},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": True},
        {"num_return_sequences": 3, "do_sample": True},
    ],
    ids=str,
)
def test_generate_equals_generate_without_a_cache(kind, how):
    m, ids = model(kind), tokens(2, 20)
    results = []
    for cached in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
        torch.manual_seed(0)
        results.append(answer(m, ids, attention_mask=torch.ones_like(ids), max_new_tokens=15, **how, **cached))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("kind", ["linear", "mixture"])
def test_prompts_of_different_lengths(kind, how):
    m, prompts = model(kind), [tokens(1, length, seed=length) for length in (25, 9, 1)]
    ids = torch.cat([torch.nn.functional.pad(p, (25 - p.shape[1], 0)) for p in prompts])
    together = answer(m, ids, attention_mask=(ids != 0).long(), **how)
    for row, prompt in enumerate(prompts):
        alone = answer(m, prompt, attention_mask=torch.ones_like(prompt), use_cache=False)
        assert torch.equal(together[row, 25:], alone[0, prompt.shape[1] :])


def test_going_on_from_a_kept_cache():
    m, ids = model("mixture"), tokens(1, 40)
    cache = DynamicCache(config=m.config)
    first = answer(m, ids[:, :20], past_key_values=cache, max_new_tokens=10)
    turn = torch.cat([first, ids[:, 20:]], 1)
    kept = copy.deepcopy(cache)
    assert torch.equal(answer(m, turn, past_key_values=cache), answer(m, turn, use_cache=False))
    assert torch.equal(answer(m, turn, past_key_values=kept), answer(m, turn, use_cache=False))


@pytest.mark.parametrize("kind", ["linear", "mixture", "bounded mixture", "learned", "modern"])
def test_assisted_decoding(kind):
    m, ids = model(kind), tokens(1, 20)
    right = answer(m, ids, use_cache=False, max_new_tokens=40)
    assert torch.equal(answer(m, ids, assistant_model=model(kind, window=3), max_new_tokens=40), right)
    repeating = tokens(1, 10).repeat(1, 4)
    right = answer(m, repeating, use_cache=False)
    assert torch.equal(answer(m, repeating, prompt_lookup_num_tokens=5), right)


def test_streaming_text(capsys):
    class Letters:
        def decode(self, ids, **_):
            return "".join(chr(97 + int(i) % 26) for i in ids)

    m, ids = model(), tokens(1, 20)
    out = answer(m, ids, streamer=TextStreamer(Letters(), skip_prompt=True))
    assert capsys.readouterr().out == Letters().decode(out[0, 20:]) + "\n"


# ---- compiled decoding


@pytest.mark.parametrize("kind", ["linear", "learned", "mixture", "modern"])
def test_a_compiled_step_serves_all_tokens(kind):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    m, ids = model(kind), tokens(2, LENGTH)
    step = torch.compile(m.forward, fullgraph=True, backend=backend)
    cache = StaticCache(config=m.config, max_cache_len=LENGTH)
    logits = [m(ids[:, :20], past_key_values=cache).logits]
    logits += [step(ids[:, i : i + 1].clone(), past_key_values=cache).logits.clone() for i in range(20, LENGTH)]
    close_logits(torch.cat(logits, 1), whole(m, ids))
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", ["linear", "learned", "mixture"])
def test_a_model_compiled_for_all_shapes_goes_on_with_its_cache(kind):
    torch.compiler.reset()
    m, ids = model(kind), tokens(2, LENGTH)
    compiled = torch.compile(m, dynamic=True, backend="eager")
    cache = DynamicCache(config=m.config)
    with torch.no_grad():
        logits = [compiled(part, past_key_values=cache).logits for part in ids.split([20, 1, 1, LENGTH - 22], dim=1)]
    close_logits(torch.cat(logits, 1), whole(m, ids))


def test_generate_compiles_the_step_once():
    from transformers import CompileConfig

    torch._dynamo.reset()
    m, ids = model("mixture"), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    compiling = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiling._compile_all_devices = True
    how = {"attention_mask": mask, "max_new_tokens": 40}
    torch._dynamo.utils.counters.clear()
    out = answer(m, ids, cache_implementation="static", compile_config=compiling, **how)
    assert torch.equal(out, answer(m, ids, use_cache=False, **how))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ---- size


def test_the_papers_model_holds_sixteen_thousand_rows():
    with torch.device("meta"):
        m = FibAttnForCausalLM(FibAttnConfig())
    rows = [m.config.layer_reach(layer) + 1 for layer in range(16)]
    assert sum(rows) == 15_807
    assert (min(rows), max(rows)) == (495, 1481)


def test_a_stream_far_past_the_reach_keeps_its_memory():
    m = model("linear", num_hidden_layers=2, rungs=5)
    held = []
    prompt = tokens(1, 40)[0].tolist()
    for made, _ in enumerate(stream(m, prompt, seed=0), 1):
        if made in (100, 600):
            gc.collect()
            held.append(sum(x.numel() * x.element_size() for x in gc.get_objects() if isinstance(x, torch.Tensor)))
        if made == 600:
            break
    assert held[1] <= held[0]


def test_only_the_full_layers_grow_past_their_reach():
    m, cache = model("mixture"), DynamicCache()
    sizes = []
    for ids in tokens(1, 120).split(40, dim=1):
        m(ids, past_key_values=cache)
        sizes.append([layer.keys.shape[2] for layer in cache.layers])
    reaches = [m.config.layer_reach(layer) for layer in range(4)]
    assert reaches[1] is None
    for layer, size in enumerate(zip(*sizes, strict=True)):
        assert size == ((40, 80, 120) if layer == 1 else tuple(min(n, reaches[layer] + 1) for n in (40, 80, 120)))


@pytest.mark.parametrize("kind", ["linear", "learned"])
def test_a_ring_takes_no_more_than_its_text_and_grows_by_doubling(kind):
    m, cache, ids = model(kind, rungs=9), DynamicCache(), tokens(2, 180)
    sizes = []
    logits = []
    for piece in (*ids[:, :10].split(10, 1), *ids[:, 10:].split(1, 1)):
        logits.append(m(piece, past_key_values=cache).logits)
        sizes.append(cache.layers[-1].keys.shape[2])
    close_logits(torch.cat(logits, 1), whole(m, ids))
    full = m.config.layer_reach(3) + 1
    assert 80 < full < ids.shape[1]
    assert list(dict.fromkeys(sizes)) == [10, 20, 40, 80, full]
    cache.reset()
    close_logits(m(ids, past_key_values=cache).logits, whole(m, ids))


# ---- the cache's own methods


# Transformers 5.17 keeps the length of a dynamic full-attention layer when it is reset: no such layer there.
@pytest.mark.parametrize(("made", "kind"), [("dynamic", "linear"), ("static", "mixture")])
def test_reset_begins_anew(made, kind):
    m, ids = model(kind), tokens(2, 50)
    cache = CACHES[made](m)
    in_pieces(m, ids.flip(1), [30], cache)
    cache.reset()
    close_logits(in_pieces(m, ids, [30], cache), whole(m, ids))


def test_batches_can_be_repeated_and_selected():
    m, ids = model("linear"), tokens(2, 50)
    cache = DynamicCache(config=m.config)
    in_pieces(m, ids[:, :30], [20], cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([2, 0]))
    ours = m(ids[:, 30:].flip(0), past_key_values=cache).logits
    close_logits(ours, whole(m, ids)[:, 30:].flip(0))
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.get_seq_length() == 50


def test_update_returns_what_the_tokens_may_attend_to():
    for ring in (DynamicRingLayer(), StaticRingLayer()):
        ring.claim("a pattern", 5)
        k = torch.randn(2, 3, 17, 4)
        for first, last in ((0, 7), (7, 8), (8, 17)):
            keys, values = ring.update(k[:, :, first:last], -k[:, :, first:last])
            assert torch.equal(keys[:, :, max(5 - first, 0) :], k[:, :, max(first - 5, 0) : last])
            assert torch.equal(values, -keys)
            assert keys.shape[2] == ring.get_mask_sizes(last - first)[0]


# ---- bad input


@pytest.mark.parametrize("kind", ["linear", "learned", "mixture", "bounded mixture", "converted"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_cache_made_in_inference_mode_goes_on_outside_of_it(kind, static):
    m = fibattn.convert(foreign_decoders.model(), window=3, rungs=7) if kind == "converted" else model(kind)
    if static and kind == "mixture":
        pytest.skip("the cache layers of full attention are Transformers' own, and Llama's cannot either")
    ids = tokens(2, 40)
    with torch.inference_mode():
        cache = StaticCache(config=m.config, max_cache_len=40) if static else DynamicCache(config=m.config)
        m(ids[:, :9], past_key_values=cache, use_cache=True)
        right = whole(m, ids)
    with torch.enable_grad():
        pieces = [m(piece, past_key_values=cache, use_cache=True).logits for piece in ids[:, 9:30].split([1, 17, 3], 1)]
        torch.cat(pieces, 1).sum().backward()
    with torch.inference_mode():
        pieces.append(m(ids[:, 30:], past_key_values=cache, use_cache=True).logits)
    close_logits(torch.cat(pieces, 1).detach(), right[:, 9:])
    assert m.lm_head.weight.grad.abs().max() > 0
    if kind == "mixture":
        return  # Transformers 5.17 does not empty its own layers
    cache.reset()
    close_logits(m(ids[:, :5], past_key_values=cache, use_cache=True).logits.detach(), right[:, :5])


def test_a_cache_rearranged_in_inference_mode_goes_on_outside_of_it():
    m, ids = model("linear"), tokens(2, 40)
    cache = DynamicCache(config=m.config)
    with torch.inference_mode():
        m(ids[:, :20], past_key_values=cache, use_cache=True)
        cache.batch_select_indices(torch.tensor([1]))
    close_logits(m(ids[1:, 20:], past_key_values=cache, use_cache=True).logits, whole(m, ids[1:])[:, 20:])


def test_a_cache_of_another_model_is_refused():
    m, ids = model("linear"), tokens(1, 20)
    cache = DynamicCache(config=m.config)
    m(ids, past_key_values=cache)
    for other, message in (
        (model("fixed"), "was written for the pattern"),
        (model("learned"), "was written for the pattern"),
        (model("full"), "forgets what is far back"),
    ):
        with pytest.raises(InputError, match=message):
            other(ids, past_key_values=cache)
    with pytest.raises(InputError, match=r"\(1, 2, 8\) in torch.float32"):
        m(tokens(2, 20), past_key_values=cache)
    with pytest.raises(InputError, match=r"\(1, 2, 8\) in torch.float32"):
        copy.deepcopy(m).to(torch.bfloat16)(ids, past_key_values=cache)
    full = DynamicCache()
    model("full")(ids, past_key_values=full)
    with pytest.raises(InputError, match="DynamicLayer with tokens that this model has not written"):
        m(ids, past_key_values=full)
    shape = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=4, **shape))
    full = StaticCache(config=llama.config, max_cache_len=30)
    llama(ids, past_key_values=full)
    with pytest.raises(InputError, match="StaticLayer with tokens that this model has not written"):
        m(ids, past_key_values=full)


def test_a_cache_too_small_for_a_chunk_is_refused():
    m = model("mixture")
    cache = StaticCache(config=m.config, max_cache_len=30)
    with pytest.raises(InputError, match="31 tokens do not fit into a static cache of 30 that holds 0"):
        m(tokens(1, 31), past_key_values=cache)
    cache = StaticCache(config=m.config, max_cache_len=30)
    m(tokens(1, 25), past_key_values=cache)
    with pytest.raises(InputError, match="6 tokens do not fit into a static cache of 30 that holds 25"):
        m(tokens(1, 6), past_key_values=cache)


def test_positions_that_go_back_are_refused():
    m, ids = model("linear"), tokens(1, 20)
    for positions in (torch.arange(5), torch.tensor([20, 21, 22, 21, 22])):
        cache = DynamicCache(config=m.config)
        m(ids, past_key_values=cache)
        with pytest.raises(InputError, match="after 20 tokens in the cache; they must go on from there"):
            m(ids[:, :5], past_key_values=cache, position_ids=positions[None])


def test_a_prompt_of_no_tokens_is_refused():
    m = model("linear")
    for cache in (None, DynamicCache(config=m.config)):
        with pytest.raises(InputError, match="there are no tokens"):
            m(torch.empty(1, 0, dtype=torch.long), past_key_values=cache)
    with pytest.raises(InputError, match="there are no tokens"):
        m(torch.empty(0, 5, dtype=torch.long))
    with pytest.raises(InputError, match="the prompt has no tokens"):
        next(stream(m, []))


def test_an_unclaimed_ring_is_refused():
    k = torch.randn(1, 2, 3, 8)
    with pytest.raises(InputError, match="belongs to no layer of a model yet"):
        DynamicCache(config=config()).update(k, k, 0)
