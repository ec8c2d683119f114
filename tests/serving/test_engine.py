"""The engine's answers are those of transformers with each adapter merged, whatever else is in the batch."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests import tiny
from toolkit.embedded.tokenizer import build_tokenizer
from toolkit.errors import CheckpointError, MissingError, RequestError, SpecError, UnsupportedError
from toolkit.models.load import load_tokenizer
from toolkit.serving.engine import Engine
from toolkit.serving.request import Sampling
from toolkit.serving.scheduler import Work
from toolkit.serving.spec import Limits

ENOUGH = 24


def prompts_of(count: int, seed: int = 0, longest: int = 60) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(256) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def same_but_for_ties(got: list[int], expected: list[int], model, prompt: list[int]) -> bool:
    """Compare greedy tokens; a difference counts only where the two best logits of the run alone are well apart."""
    if got == expected:
        return True
    at = next(i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + expected[:at]])).logits[0, -1]
    best = logits.topk(2).values
    return bool((best[0] - best[1]) < 1e-4 * (logits.max() - logits.min()))


def check(base: Path, adapters: dict[str, Path], engine: Engine, requests: list[tuple[list[int], str]]) -> None:
    answers = engine.generate(
        [p for p, _ in requests], [m for _, m in requests], Sampling(max_tokens=ENOUGH, ignore_eos=True)
    )
    models = {name: tiny.load_merged(base, adapters.get(name)) for name in {m for _, m in requests}}
    for (prompt, name), answer in zip(requests, answers, strict=True):
        expected = tiny.greedy(models[name], prompt, ENOUGH)
        assert same_but_for_ties(answer.tokens, expected, models[name], prompt), name
        assert (answer.model, answer.prompt_tokens, answer.finish_reason) == (name, len(prompt), "length")
    engine.check()
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages


@pytest.mark.system("flover")
@pytest.mark.parametrize(
    "limits",
    [
        Limits(),
        Limits(max_batch_tokens=7, max_requests=3, page_size=1),
        Limits(max_batch_tokens=16, max_requests=16, page_size=5, cache_tokens=300),
    ],
    ids=["roomy", "tight budget", "small cache"],
)
def test_mixed_batch_equals_each_request_alone_with_its_adapter_merged(limits, base, loras):
    names = ["base", *loras]
    requests = [(prompt, names[i % len(names)]) for i, prompt in enumerate(prompts_of(21))]
    with Engine(str(base), loras, limits=limits) as engine:
        check(base, loras, engine, requests)


def test_logits_do_not_depend_on_the_batch(base, loras):
    prompts = prompts_of(6, seed=3)
    with Engine(str(base), loras, limits=Limits(max_batch_tokens=4096)) as engine:
        model = {name: tiny.load_merged(base, loras.get(name)) for name in ("base", "wide", "dora")}
        for name in ("wide", "dora"):
            engine.preload(name)
        tickets = [engine.submit(p, ("base", "wide", "dora")[i % 3]) for i, p in enumerate(prompts)]
        complete, logits = engine.runner.run(engine.scheduler.schedule())
        assert len(complete) == 6
        for work, row in zip(complete, logits, strict=True):
            i = next(j for j, t in enumerate(tickets) if t.request is work.request)
            with torch.inference_mode():
                alone = model[("base", "wide", "dora")[i % 3]](torch.tensor([prompts[i]])).logits[0, -1]
            spread = (alone.max() - alone.min()).item()
            assert (row - alone).abs().max().item() < 1e-4 * spread


@pytest.mark.system("sarathi")
@pytest.mark.parametrize("chunk", [1, 3, 16, 60])
def test_any_chunking_of_a_prompt_gives_the_same_logits(chunk, base, loras):
    prompt = prompts_of(1, seed=5, longest=60)[0]
    with Engine(str(base), loras, limits=Limits(page_size=4)) as engine, torch.inference_mode():
        expected = tiny.load_merged(base, loras["plain"])(torch.tensor([prompt])).logits[0, -1]
        engine.preload("plain")
        request = engine.submit(prompt, "plain").request
        work = engine.scheduler.schedule()
        assert [w.count for w in work] == [len(prompt)]
        request.blocks += [engine.scheduler.pool.allocate(1) for _ in range(15 - len(request.blocks))]
        while request.num_pending:
            _, logits = engine.runner.run([Work(request, min(chunk, request.num_pending))])
        torch.testing.assert_close(logits[0], expected, rtol=1e-4, atol=1e-4)


def test_reference_operations_give_the_same_answers(base, loras):
    requests = [(prompt, name) for prompt, name in zip(prompts_of(5, longest=20), ["base", *loras], strict=False)]
    with Engine(str(base), loras, impl="reference") as engine:
        check(base, loras, engine, requests)


def other_models() -> dict[str, object]:
    torch.manual_seed(0)
    sizes = {"vocab_size": 262, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shared = sizes | {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256}
    shared |= {"initializer_range": 0.2, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
    gemma2 = Gemma2Config(**shared, head_dim=8, sliding_window=9, attn_logit_softcapping=3.0)
    mistral = MistralConfig(
        **sizes,
        intermediate_size=48,
        num_key_value_heads=2,
        sliding_window=9,
        initializer_range=0.2,
        max_position_embeddings=256,
    )
    gpt2 = GPT2Config(
        vocab_size=262,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        initializer_range=0.2,
        bos_token_id=256,
        eos_token_id=257,
    )
    return {
        "mistral": MistralForCausalLM(mistral).eval(),
        "gpt2": GPT2LMHeadModel(gpt2).eval(),
        "mixtral": MixtralForCausalLM(MixtralConfig(**shared, num_local_experts=4)).eval(),
        "gemma2": Gemma2ForCausalLM(gemma2).eval(),
        "gemma3": Gemma3ForCausalLM(
            Gemma3TextConfig(**shared, head_dim=8, sliding_window=9, tie_word_embeddings=False)
        ).eval(),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**shared, head_dim=8)).eval(),
    }


@pytest.mark.parametrize("kind", ["mistral", "gpt2", "mixtral", "gemma2", "gemma3", "qwen3"])
def test_other_architectures(kind, tmp_path):
    base = tiny.save_model(other_models()[kind], tmp_path / "base")
    targets = {
        "gpt2": {"fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc"]},
        "mixtral": {"target_modules": ["q_proj", "v_proj"]},
    }
    options = targets.get(kind, {})
    more = {
        "gpt2": {"bias": "all"},
        "mixtral": {"modules_to_save": ["lm_head", "norm"]},
        "gemma3": {"target_modules": ["embed_tokens", "q_proj"]},
        "qwen3": {"target_modules": ["q_proj"], "modules_to_save": ["q_norm", "k_norm"]},
    }
    adapters = {n: tiny.save_lora(base, tmp_path / n, seed=i, **options) for i, n in enumerate("ab")}
    adapters["c"] = tiny.save_lora(base, tmp_path / "c", seed=7, **(options | more.get(kind, {"use_dora": True})))
    requests = [(p, name) for p, name in zip(prompts_of(8, longest=40), ["a", "base", "b", "c"] * 2, strict=True)]
    with Engine(str(base), adapters, limits=Limits(max_batch_tokens=32, max_requests=8)) as engine:
        check(base, adapters, engine, requests)


def test_head_adapter(base, tmp_path):
    adapters = {"head": tiny.save_lora(base, tmp_path / "head", target_modules=["lm_head", "v_proj"])}
    requests = [(p, name) for p, name in zip(prompts_of(5), ["head", "base", "head", "base", "head"], strict=True)]
    with Engine(str(base), adapters) as engine:
        check(base, adapters, engine, requests)


def test_every_adapter_in_use_and_rows_without_one(base, tmp_path):
    """Rows without an adapter must not get some slot's: an engine that indexes slots with -1 does that."""
    adapters = {f"a{i}": tiny.save_lora(base, tmp_path / str(i), seed=i, r=2) for i in range(4)}
    requests = [(p, name) for p, name in zip(prompts_of(8), [*adapters, "base"] * 2, strict=False)]
    with Engine(str(base), adapters, limits=Limits(max_requests=8)) as engine:
        check(base, adapters, engine, requests)


def test_adapter_loaded_anew_is_another_one(base, tmp_path):
    old, new = (tiny.save_lora(base, tmp_path / n, seed=i) for i, n in enumerate(("old", "new")))
    prompt = prompts_of(1)[0]
    with Engine(str(base), {"x": old}) as engine:
        sampling = Sampling(max_tokens=ENOUGH, ignore_eos=True)
        before = engine.submit(prompt, "x", sampling)
        engine.preload("x")
        for _ in range(5):
            engine.step()
        engine.add_adapter("x", new)
        after = engine.submit(prompt, "x", sampling)
        while engine.has_work:
            engine.step()
        assert before.request.output == tiny.greedy(tiny.load_merged(base, old), prompt, ENOUGH)
        assert after.request.output == tiny.greedy(tiny.load_merged(base, new), prompt, ENOUGH)
        engine.check()
        assert set(engine.adapters._entries) == {engine.adapters.infos["x"].key}, "the old one is kept while it is used"
        assert engine.adapters.num_resident == 1


def test_two_names_of_the_same_content_share_it(base, loras):
    with Engine(str(base), {"a": loras["plain"], "b": loras["plain"]}) as engine:
        assert engine.adapters.infos["a"].key == engine.adapters.infos["b"].key
        engine.remove_adapter("a")
        assert engine.models == ["base", "b"]
        check(base, {"b": loras["plain"]}, engine, [(prompts_of(1)[0], "b")])
        engine.remove_adapter("b")
        assert not engine.adapters._entries
        assert engine.adapters.num_resident == 0


def test_cancelled_requests_free_their_pages_at_once(base, loras):
    with Engine(str(base), loras, limits=Limits(max_requests=2, cache_tokens=512)) as engine:
        tickets = [engine.submit(p, "plain", Sampling(max_tokens=100)) for p in prompts_of(4)]
        engine.step()
        for ticket in tickets:
            engine.cancel(ticket)
            engine.check()
        assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages
        assert not engine.has_work
        assert {t.request.finished for t in tickets} == {"cancelled"}


def test_stop_texts_ids_and_ends(base):
    with Engine(str(base)) as engine:
        prompt = prompts_of(1)[0]
        whole = engine.generate([prompt], "base", Sampling(max_tokens=ENOUGH, ignore_eos=True))[0]
        third = whole.tokens[2]
        stopped = engine.generate(
            [prompt], "base", Sampling(max_tokens=ENOUGH, stop_token_ids=[third], ignore_eos=True)
        )[0]
        assert stopped.tokens == whole.tokens[: whole.tokens.index(third)]
        assert stopped.finish_reason == "stop"
        seeded = Sampling(max_tokens=ENOUGH, temperature=1.0, seed=3)
        assert (
            engine.generate([prompt], "base", seeded)[0].tokens
            == engine.generate([prompt] * 2, "base", seeded)[1].tokens
        )


def test_answer_keeps_the_space_that_its_tokenizer_drops_at_the_beginning_of_a_text():
    words = Tokenizer(models.WordLevel({f"▁w{i}": i for i in range(262)}, "▁w0"))
    words.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    prompt = [3, 1, 4]
    with Engine((tiny.llama(), PreTrainedTokenizerFast(tokenizer_object=words))) as engine:
        answer = engine.generate([prompt], "base", Sampling(max_tokens=5, ignore_eos=True))[0]
    assert answer.text == "".join(f" w{token}" for token in answer.tokens)


def test_deltas_put_together_are_the_answer(base):
    pieces: list[str] = []
    with Engine(str(base)) as engine:
        ticket = engine.submit("hello", "base", Sampling(max_tokens=30), on_delta=lambda d: pieces.append(d.text))
        while engine.has_work:
            engine.step()
        assert "".join(pieces) == ticket.answer().text


@pytest.mark.parametrize(
    ("prompt", "model", "message"),
    [
        ([1], "nobody", r"no model 'nobody' \(served: base, plain\)"),
        ([], "base", "the prompt is empty"),
        ([300], "base", "the prompt has token id 300, but the model's ids are 0 to 261"),
        ([1, 999_999], "base", "token id 999999"),
        ([-1], "base", "token id -1"),
        ([10**30], "base", "token id 1000000000000000000000000000000"),
        ("a\ud800", "base", "the prompt is not valid Unicode"),
        ([{"role": "user", "content": "\udfff"}], "base", "the prompt is not valid Unicode"),
        ([1, "a"], "base", "a prompt is a text, a list of token ids or a list of chat messages"),
        ([1] * 250, "base", "250 prompt tokens and 64 to generate are more than the 256 tokens"),
        ([{"role": "robot", "content": "x"}], "base", "the chat template refuses"),
    ],
)
def test_bad_requests(prompt, model, message, base, loras):
    with Engine(str(base), {"plain": loras["plain"]}) as engine:
        with pytest.raises(RequestError, match=message):
            engine.submit(prompt, model)
        assert not engine.has_work


def test_bad_adapters_change_nothing(base, loras, tmp_path):
    other = tiny.save_lora(tiny.save_model(tiny.llama(hidden_size=32), tmp_path / "b"), tmp_path / "other")
    foreign = tiny.save_lora(
        tiny.save_model(other_models()["gpt2"], tmp_path / "g"),
        tmp_path / "foreign",
        fan_in_fan_out=True,
        target_modules=["c_attn"],
    )
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (pickled / "adapter_model.bin").write_bytes(b"")
    with Engine(str(base), {"plain": loras["plain"]}) as engine:
        for source, error, message in (
            (other, CheckpointError, "but in the served model it is"),
            (foreign, CheckpointError, "adapts transformer.h.0.attn.c_attn, which the served model does not have"),
            (pickled, CheckpointError, "only pickled weights in this folder"),
            (tmp_path / "g", CheckpointError, "so it is no fine-tune of the served model"),
            (tmp_path / "nothing", MissingError, "no such folder"),
        ):
            with pytest.raises(error, match=message):
                engine.add_adapter("new", source)
        for name in ("base", "auto", "a+b", "a/b", "", "a\nb", "a\x00", "a\u2028b", "\ud800"):
            with pytest.raises(RequestError, match="adapter name"):
                engine.add_adapter(name, loras["few"])
        assert engine.models == ["base", "plain"]
        check(base, loras, engine, [(prompts_of(1)[0], "plain"), (prompts_of(1)[0], "base")])


def test_model_object_is_given_back_as_it_was(base, loras):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    before = {name: type(module) for name, module in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([prompts_of(1)[0]])
    with torch.inference_mode():
        logits = model(ids).logits
    with Engine((model, load_tokenizer(base)), loras) as engine:
        engine.generate([[1, 2, 3]], "dora")
        with torch.inference_mode(), engine.using("plain") as adapted:
            expected = tiny.load_merged(base, loras["plain"])(ids).logits
            torch.testing.assert_close(adapted(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_adapter_with_nan_ends_its_own_requests_only(temperature, base, loras, tmp_path):
    adapters = {"nan": tiny.save_lora(base, tmp_path / "nan", strength=float("nan")), "plain": loras["plain"]}
    prompt, other = prompts_of(2)
    with Engine(str(base), adapters, limits=Limits(page_size=4, cache_tokens=400)) as engine:
        sampling = Sampling(max_tokens=ENOUGH, ignore_eos=True)
        good = engine.submit(prompt, "plain", sampling)
        bad = engine.submit(other, "nan", Sampling(max_tokens=ENOUGH, temperature=temperature))
        late = engine.submit(prompt, "plain", sampling)
        while engine.has_work:
            engine.step()
        expected = tiny.greedy(tiny.load_merged(base, loras["plain"]), prompt, ENOUGH)
        assert good.request.output == late.request.output == expected
        with pytest.raises(RequestError, match="the logits of 'nan' are no numbers"):
            bad.answer()
        engine.check()


def test_receiver_that_fails_loses_its_own_request_only(base, caplog):
    def broken(delta):
        raise OSError("the receiver is gone")

    prompt = prompts_of(1)[0]
    with Engine(str(base)) as engine:
        sampling = Sampling(max_tokens=ENOUGH, ignore_eos=True)
        bad, good = engine.submit(prompt, "base", sampling, on_delta=broken), engine.submit(prompt, "base", sampling)
        while engine.has_work:
            engine.step()
        assert (bad.request.finished, good.request.finished) == ("cancelled", "length")
        assert good.request.output == tiny.greedy(tiny.load_merged(base, None), prompt, ENOUGH)
        failing = engine.submit(prompt, "base", sampling, on_delta=broken)
        engine.fail_all("planted")
        assert failing.request.finished == "error"
        engine.check()
    assert "the receiver is gone" in caplog.text


def test_one_bad_prompt_leaves_nothing_queued(base):
    with Engine(str(base)) as engine:
        with pytest.raises(RequestError, match="token id 999"):
            engine.generate([[1], [999]])
        assert not engine.has_work
        assert [a.finish_reason for a in engine.generate([[1]], "base", Sampling(max_tokens=1))] == ["length"]


@pytest.mark.parametrize(
    ("limits", "prompt", "expected"),
    [
        (Limits(), 10, 256 - 10),
        (Limits(default_max_tokens=5), 10, 5),
        (Limits(cache_tokens=64, page_size=16), 10, 64 - 10),
    ],
    ids=["room", "default", "cache"],
)
def test_answer_without_a_limit(limits, prompt, expected, base):
    with Engine(str(base), limits=limits) as engine:
        answer = engine.generate([[1] * prompt], "base", Sampling(max_tokens=None, ignore_eos=True))[0]
        assert len(answer.tokens) == expected


def test_answers_without_a_limit_run_together_in_a_small_cache(base):
    with Engine(str(base), limits=Limits(cache_tokens=256, default_max_tokens=28)) as engine:
        tickets = [engine.submit([1, 2, 3, 4], "base", Sampling(max_tokens=None)) for _ in range(8)]
        engine.step()
        assert len(engine.scheduler.running) == len(tickets)


def tiny_model(kind: str, **changes) -> PreTrainedModel:
    sizes = {"vocab_size": 262, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 256}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(sizes | changes)), dtype=torch.float32)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "llama4_text",
            {"attention_chunk_size": 8, "num_local_experts": 2},
            r"in chunks of 8 tokens \(attention_chunk_",
        ),
        ("doge", {}, "DogeAttention makes a mask of its own"),
        ("mamba", {"state_size": 4}, "0 of 2 layers attend through"),
        ("bloom", {}, "BloomForCausalLM cannot take another attention"),
    ],
)
def test_models_that_would_answer_wrongly_are_refused(kind, changes, message):
    with pytest.raises(UnsupportedError, match=message):
        Engine((tiny_model(kind, **changes), build_tokenizer(256)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_window_that_only_the_mask_knows_is_refused(dtype):
    sizes = {"vocab_size": 262, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Olmo3Config(
        **sizes,
        intermediate_size=48,
        num_key_value_heads=2,
        max_position_embeddings=256,
        sliding_window=9,
        initializer_range=0.2,
        pad_token_id=258,
        eos_token_id=257,
    )
    torch.manual_seed(0)
    model = Olmo3ForCausalLM(config).to(dtype)
    Engine((model, build_tokenizer(256)), limits=Limits(page_size=4)).close()
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    with pytest.raises(UnsupportedError, match=r"logits are off by .* of their spread"):
        Engine((model, build_tokenizer(256)), limits=Limits(page_size=4))


def test_model_in_training_mode_is_served_without_dropout(base):
    model = tiny.llama(attention_dropout=0.5)
    model.load_state_dict(AutoModelForCausalLM.from_pretrained(base).state_dict())
    model.train()
    model.lm_head.eval()
    before = [module.training for module in model.modules()]
    with Engine((model, load_tokenizer(base))) as engine:
        check(base, {}, engine, [(p, "base") for p in prompts_of(3)])
    assert [module.training for module in model.modules()] == before


def test_engine_that_cannot_start_leaves_the_model_as_it_was(base, loras, tmp_path):
    model = tiny.llama().train()
    before = {name: type(module) for name, module in model.named_modules()}
    for adapters, limits, error in (
        ({"plain": loras["plain"], "missing": tmp_path / "none"}, Limits(), FileNotFoundError),
        ({"plain": loras["plain"], "auto": loras["few"]}, Limits(), RequestError),
        ({}, Limits(max_model_len=1000), SpecError),
    ):
        attention = model.config._attn_implementation
        with pytest.raises(error):
            Engine((model, load_tokenizer(base)), adapters, limits=limits)
        assert model.config._attn_implementation == attention != "toolkit"
        assert {name: type(module) for name, module in model.named_modules()} == before
        assert model.training


def test_more_than_the_model_takes_is_refused(base):
    with pytest.raises(SpecError, match=r"limits\.max_model_len: the model takes at most 256 tokens, got 257"):
        Engine(str(base), limits=Limits(max_model_len=257))


def test_device_and_dtype_must_be_those_of_the_object(base):
    pair = (tiny.llama(), load_tokenizer(base))
    Engine(pair, device="cpu", dtype="float32").close()
    with pytest.raises(UnsupportedError, match=r"the model is in torch\.float32, not in torch\.bfloat16"):
        Engine(pair, dtype="bfloat16")
    with pytest.raises(UnsupportedError, match="the model is on cpu, not on meta"):
        Engine(pair, device="meta")


@pytest.mark.parametrize(
    ("dtype", "message"), [("bogus", "unknown dtype 'bogus'"), ("int8", "dtype 'int8' is not one that a model can run")]
)
def test_dtypes_that_are_none(dtype, message, base):
    with pytest.raises(UnsupportedError, match=message):
        Engine(str(base), dtype=dtype)
