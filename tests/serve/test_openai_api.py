"""The openai client, sync, async and streaming, gets what Engine.generate gives for the same seeds."""

import asyncio
import json
import shutil

import httpx
import openai
import pytest
from serving import idle, running

from seal_engine import Engine, SamplingParams
from seal_engine.tiny import MODEL

PROMPTS = ["What does Ann collect?", "Where does", "Delo Monia is"]
BASE = str(MODEL)


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as made:
        yield made


def generated(engine, prompts, adapter=None, **fields):
    """Texts of Engine.generate: for each prompt those of its samples."""
    outs = engine.generate(prompts, SamplingParams(**fields), adapters=adapter, progress=False)
    assert [out.error for out in outs] == [None] * len(outs)
    return [completion for out in outs for completion in out.outputs]


@pytest.mark.parametrize("name", [BASE, "ann", "bob"])
def test_completions_equal_the_engines(client, engine, adapters, name):
    """Several prompts with several samples: choices stand in the prompts' order, n of each."""
    adapter = None if name == BASE else adapters[name][0]
    fields = dict(n=3, temperature=0.8, top_p=0.9, max_tokens=12, seed=7)
    reply = client.completions.create(model=name, prompt=PROMPTS, **fields)
    wanted = generated(engine, PROMPTS, adapter, **fields)
    assert [choice.index for choice in reply.choices] == list(range(9))
    assert [choice.text for choice in reply.choices] == [completion.text for completion in wanted]
    assert [choice.finish_reason for choice in reply.choices] == [completion.finish_reason for completion in wanted]
    assert reply.model == name
    assert reply.usage.completion_tokens == sum(len(completion.token_ids) for completion in wanted)
    assert reply.usage.prompt_tokens == sum(len(engine.tokenizer.encode(prompt)) for prompt in PROMPTS)


def test_adapters_change_what_is_said(engine, adapters):
    """So that the equality above tells adapters apart."""
    texts = {
        name: tuple(c.text for c in generated(engine, PROMPTS, a, temperature=0, max_tokens=12))
        for name, a in [("base", None), *((name, adapter) for name, (adapter, _) in adapters.items())]
    }
    assert len(set(texts.values())) == 3


@pytest.mark.parametrize("prompt", [PROMPTS[0], [5, 17, 300], [[5, 17], [40, 41, 42]]], ids=["text", "ids", "lists"])
def test_prompts_of_every_form(client, engine, prompt):
    fields = dict(temperature=0, max_tokens=6)
    reply = client.completions.create(model=BASE, prompt=prompt, **fields)
    several = isinstance(prompt, list) and isinstance(prompt[0], list)
    assert [c.text for c in reply.choices] == [
        c.text for c in generated(engine, prompt if several else [prompt], **fields)
    ]


def test_vllms_fields(client, engine):
    """Beyond OpenAI's: top_k, min_p, penalties, min_tokens, stop_token_ids, ignore_eos; unknown ones do nothing."""
    extra = dict(
        top_k=40, min_p=0.02, repetition_penalty=1.3, min_tokens=3, stop_token_ids=[17, 40], ignore_eos=True
    )  # fmt: skip
    fields = dict(temperature=0.9, max_tokens=10, seed=3, frequency_penalty=0.4, presence_penalty=-0.3)
    unknown = {"user": "somebody", "a_field_of_tomorrow": {"x": 1}}
    reply = client.completions.create(model=BASE, prompt=PROMPTS, **fields, extra_body=extra | unknown)
    assert [c.text for c in reply.choices] == [c.text for c in generated(engine, PROMPTS, **fields, **extra)]


@pytest.mark.parametrize("name", [BASE, "bob"])
def test_streams_add_up_to_the_whole(client, engine, adapters, name):
    """Pieces of several choices interleave; each choice's add up to its text, and its last has the reason."""
    adapter = None if name == BASE else adapters[name][0]
    fields = dict(n=2, temperature=0.8, max_tokens=12, seed=5)
    texts, reasons, usage = {}, {}, None
    options = {"include_usage": True}
    for chunk in client.completions.create(model=name, prompt=PROMPTS, stream=True, stream_options=options, **fields):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                assert choice.index not in reasons
                reasons[choice.index] = choice.finish_reason
    wanted = generated(engine, PROMPTS, adapter, **fields)
    assert [texts[i] for i in range(6)] == [completion.text for completion in wanted]
    assert [reasons[i] for i in range(6)] == [completion.finish_reason for completion in wanted]
    assert usage.completion_tokens == sum(len(completion.token_ids) for completion in wanted)


def test_stop_texts(client, engine):
    """Cut off, or kept where that is asked for; a stream never sends a part of one."""
    (long,) = generated(engine, PROMPTS[:1], temperature=1, seed=0, max_tokens=30, ignore_eos=True)
    stop = long.text[12:15]
    fields = dict(model=BASE, prompt=PROMPTS[0], temperature=1, seed=0, max_tokens=30, stop=["never", stop])
    extra = {"ignore_eos": True}
    cut = long.text[: long.text.index(stop)]
    (choice,) = client.completions.create(**fields, extra_body=extra).choices
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (cut, "stop", stop)
    for included, text in ((False, cut), (True, cut + stop)):
        extra["include_stop_str_in_output"] = included
        pieces = [c.choices[0].text for c in client.completions.create(**fields, extra_body=extra, stream=True)]
        assert "".join(pieces) == text
        assert client.completions.create(**fields, extra_body=extra).choices[0].text == text


def test_special_tokens_in_the_text(client, engine):
    """skip_special_tokens=False shows the end token where it ended nothing."""
    fields = dict(model=BASE, prompt=PROMPTS[0], temperature=0, max_tokens=6)
    extra = {"ignore_eos": True, "skip_special_tokens": False}
    (wanted,) = generated(engine, PROMPTS[:1], temperature=0, max_tokens=6, ignore_eos=True)
    text = engine.tokenizer.decode(wanted.token_ids)
    assert "<|end|>" in text
    assert client.completions.create(**fields, extra_body=extra).choices[0].text == text
    assert (
        "".join(c.choices[0].text for c in client.completions.create(**fields, extra_body=extra, stream=True)) == text
    )


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(client, engine, adapters, stream):
    """Of every token, with the three most likely ones, under an adapter; the numbers are Engine.generate's."""
    fields = dict(temperature=0.7, max_tokens=8, seed=2, logprobs=3)
    reply = client.completions.create(model="ann", prompt=PROMPTS[0], stream=stream, **fields)
    (wanted,) = generated(engine, PROMPTS[:1], adapters["ann"][0], **fields)
    choices = [chunk.choices[0] for chunk in reply] if stream else reply.choices
    values = [value for choice in choices for value in choice.logprobs.token_logprobs]
    assert values == pytest.approx(wanted.logprobs, abs=1e-4)
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    tops = [top for choice in choices for top in choice.logprobs.top_logprobs]
    for token, value, top, top_wanted in zip(tokens, values, tops, wanted.top_logprobs, strict=True):
        assert top[token] == value
        assert sorted(top.values())[-3:] == pytest.approx(sorted(top_wanted.values()), abs=1e-4)
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    assert offsets == [sum(map(len, tokens[:i])) for i in range(len(tokens))]


@pytest.mark.parametrize("stream", [False, True])
def test_echo_in_a_stream_and_whole(client, engine, stream):
    """max_tokens 0 scores a prompt: its text and log-probabilities, and nothing sampled."""
    fields = dict(model=BASE, prompt=PROMPTS[0], echo=True, logprobs=1, temperature=0)
    ids = engine.tokenizer.encode(PROMPTS[0])
    for max_tokens in (0, 3):
        reply = client.completions.create(**fields, max_tokens=max_tokens, stream=stream)
        choices = [chunk.choices[0] for chunk in reply] if stream else reply.choices
        values = [value for choice in choices for value in choice.logprobs.token_logprobs]
        text = "".join(choice.text for choice in choices)
        (wanted,) = generated(engine, PROMPTS[:1], temperature=0, max_tokens=3, logprobs=0)
        assert text == PROMPTS[0] + (wanted.text if max_tokens else "")
        assert values[0] is None
        sampled = (wanted.logprobs or []) if max_tokens else []
        assert values[1:] == pytest.approx([*engine.score([ids])[0].tolist(), *sampled], abs=1e-4)


def test_lm_evals_request(client, engine):
    """local-completions: batches of token ids, greedy, one token, log-probabilities of the prompt. "Is greedy" is
    exact equality with the largest of top_logprobs, so a greedy continuation must pass it token by token."""
    context = engine.tokenizer.encode("What does Ann collect?")
    (greedy,) = generated(engine, [context], temperature=0, max_tokens=6, ignore_eos=True)
    other = [17, 40, 300, 5]
    batch = [[*context, *greedy.token_ids], [*context, *other]]
    reply = client.completions.create(
        model=BASE, prompt=batch, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    )
    for ids, choice in zip(batch, sorted(reply.choices, key=lambda choice: choice.index), strict=True):
        values, tops = choice.logprobs.token_logprobs, choice.logprobs.top_logprobs
        assert len(values) == len(tops) == len(choice.logprobs.tokens) == len(ids) + 1
        assert values[0] is None
        assert tops[0] is None
        assert values[1:-1] == pytest.approx(engine.score([ids])[0].tolist(), abs=1e-4)
        continued = range(len(context), len(ids))
        is_greedy = all(values[i] == max(tops[i].values()) for i in continued)
        assert is_greedy == (ids[len(context) :] == greedy.token_ids)


def chat_ids(engine, messages):
    text = "".join(f"{m['role']}: {m['content']}\n" for m in messages) + "assistant:"
    return engine.tokenizer.encode(text, add_special_tokens=False)


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What does Ann collect?"}]


@pytest.mark.parametrize("stream", [False, True])
def test_chats(client, engine, adapters, stream):
    """Through the template, with samples and log-probabilities; equal to the engine's on the same token ids."""
    fields = dict(n=2, temperature=0.8, seed=11, max_tokens=9)
    more = dict(logprobs=True, top_logprobs=2)
    reply = client.chat.completions.create(model="bob", messages=MESSAGES, stream=stream, **fields, **more)
    wanted = generated(engine, [chat_ids(engine, MESSAGES)], adapters["bob"][0], **fields, logprobs=2)
    if stream:
        texts, values = ["", ""], [[], []]
        for chunk in reply:
            (choice,) = chunk.choices
            texts[choice.index] += choice.delta.content or ""
            if choice.logprobs is not None:
                values[choice.index] += choice.logprobs.content
    else:
        texts = [choice.message.content for choice in reply.choices]
        values = [choice.logprobs.content for choice in reply.choices]
    assert texts == [completion.text for completion in wanted]
    for entries, completion in zip(values, wanted, strict=True):
        assert [entry.logprob for entry in entries] == pytest.approx(completion.logprobs, abs=1e-4)
        assert [len(entry.top_logprobs) for entry in entries] == [2] * len(entries)
        assert all(bytes(entry.bytes).decode() == entry.token for entry in entries)


def test_responses(client, engine):
    """What SEAL's drivers grade with: text in, output_text out; instructions are a system's turn."""
    (wanted,) = generated(engine, [chat_ids(engine, MESSAGES)], temperature=0, max_tokens=8)
    reply = client.responses.create(
        model=BASE, input=MESSAGES[1]["content"], instructions="Be brief.", temperature=0, max_output_tokens=8
    )
    assert reply.output_text == wanted.text
    again = client.responses.create(model=BASE, input=MESSAGES, temperature=0, max_output_tokens=8)
    assert again.output_text == wanted.text


def test_many_at_once_through_the_async_client(server, engine, adapters):
    """Requests of the base and of two adapters in the same steps: each gets its own answer; nothing is left behind."""
    names = [BASE, "ann", "bob"]

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:

            async def stream(i):
                parts = await client.completions.create(
                    model=names[i % 3], prompt=PROMPTS[i % 2], temperature=1, seed=i, max_tokens=10, stream=True
                )
                return "".join([part.choices[0].text async for part in parts])

            async def whole(i):
                reply = await client.completions.create(
                    model=names[i % 3], prompt=PROMPTS[i % 2], temperature=1, seed=i, max_tokens=10
                )
                return reply.choices[0].text

            return await asyncio.gather(*((stream if i % 4 == 0 else whole)(i) for i in range(36)))

    texts = asyncio.run(ask())
    params = [SamplingParams(temperature=1, seed=i, max_tokens=10) for i in range(36)]
    owners = [None if i % 3 == 0 else adapters[names[i % 3]][0] for i in range(36)]
    outs = engine.generate([PROMPTS[i % 2] for i in range(36)], params, owners, progress=False)
    assert texts == [out.outputs[0].text for out in outs]
    assert idle(server)


def test_models_and_tokens(server, client, engine):
    listed = client.models.list().data
    assert [model.id for model in listed] == [BASE, "ann", "bob"]
    assert [model.parent for model in listed] == [None, BASE, BASE]
    ids = engine.tokenizer.encode(PROMPTS[0])
    reply = httpx.post(f"{server.url}/tokenize", json={"model": "ann", "prompt": PROMPTS[0], "return_token_strs": True})
    assert reply.json()["tokens"] == ids
    assert reply.json()["count"] == len(ids)
    assert "".join(reply.json()["token_strs"]) == PROMPTS[0]
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": ids}).json() == {"prompt": PROMPTS[0]}
    chat = httpx.post(f"{server.url}/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    assert chat == chat_ids(engine, MESSAGES)
    assert httpx.get(f"{server.url}/version").json().keys() == {"version"}
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_the_bases_names(client):
    """Its path, the last part of its path: SEAL's drivers use either."""
    for name in (BASE, MODEL.name):
        assert client.completions.create(model=name, prompt="A", max_tokens=1).model == name


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "nobody"}, 404, "model"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"n": 0}, 400, "n"),
        ({"n": 10**6}, 400, "n"),
        ({"logprobs": 21}, 400, "logprobs"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [[1], []]}, 400, "prompt[1]"),
        ({"prompt": [99999]}, 400, "prompt"),
        ({"prompt": [1] * 5000}, 400, "prompt"),
        ({"stop": ""}, 400, "stop"),
        ({"stop": "x<|end|>"}, 400, "stop"),
        ({"stop_token_ids": [-1]}, 400, "stop_token_ids"),
        ({"seed": -5}, 400, "seed"),
        ({"frequency_penalty": 3}, 400, "frequency_penalty"),
        ({"best_of": 4}, 400, "best_of"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"suffix": "end"}, 400, "suffix"),
        ({"use_beam_search": True}, 400, "use_beam_search"),
        ({"guided_json": {"type": "object"}}, 400, "guided_json"),
    ],
)
def test_errors_name_the_field(client, fields, status, param):
    """In OpenAI's form; fields that are known and not supported are refused, never ignored. Streams get a status."""
    body = {"model": BASE, "prompt": "A", "max_tokens": 1} | fields
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError) as caught:
            client.post("/completions", body={**body, "stream": stream}, cast_to=object)
        error = caught.value.response.json()["error"]
        assert caught.value.status_code == error["code"] == status
        assert error["param"] == param
        assert error["message"]
        assert error["type"] in ("BadRequestError", "NotFoundError")


def test_neutral_values_of_unsupported_fields_are_accepted(client):
    neutral = {
        "best_of": 1, "logit_bias": {}, "suffix": None, "response_format": {"type": "text"}, "use_beam_search": False
    }  # fmt: skip
    client.post("/completions", body={"model": BASE, "prompt": "A", "max_tokens": 1, **neutral}, cast_to=object)


def test_token_ids_are_returned(client, engine):
    (wanted,) = generated(engine, PROMPTS[:1], temperature=0, max_tokens=4)
    extra = {"return_token_ids": True, "prompt_logprobs": 2}
    (choice,) = client.completions.create(
        model=BASE, prompt=PROMPTS[0], temperature=0, max_tokens=4, extra_body=extra
    ).choices
    ids = engine.tokenizer.encode(PROMPTS[0])
    assert choice.prompt_token_ids == ids
    assert choice.token_ids == wanted.token_ids
    assert choice.prompt_logprobs[0] is None
    score = engine.score([ids])[0].tolist()
    values = [choice.prompt_logprobs[i][str(ids[i])]["logprob"] for i in range(1, len(ids))]
    assert values == pytest.approx(score, abs=1e-4)


def test_settings_that_a_request_leaves_out(engine, tmp_path):
    """vLLM's defaults, or with --sampling-defaults model those of the checkpoint; a request's own come first."""
    shutil.copytree(MODEL, tmp_path / "model")
    config = {"do_sample": True, "temperature": 0.3, "top_k": 5, "repetition_penalty": 1.4, "eos_token_id": 0}
    (tmp_path / "model/generation_config.json").write_text(json.dumps(config))
    own = Engine.from_pretrained(tmp_path / "model", device="cpu")
    asked = dict(max_tokens=12, seed=1)
    for flags, defaults in (([], {}), (["--sampling-defaults", "model"], own.sampling_defaults())):
        with running(own, *flags) as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x") as client:
            for fields in (asked, {**asked, "temperature": 1.2}):
                (choice,) = client.completions.create(model=BASE, prompt=PROMPTS[0], **fields).choices
                (wanted,) = generated(own, PROMPTS[:1], **{**defaults, **fields})
                assert choice.text == wanted.text
