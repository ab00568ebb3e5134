"""seal_engine.model.tokenizer against Hugging Face Transformers, on small tokenizers trained here."""

import enum
import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from seal_engine.model.tokenizer import Tokenizer
from seal_engine.types import InputError

CORPUS = [
    "The quick brown fox jumps over the lazy dog; it's said that foxes don't, and that dogs won't.",
    "def add(first, second):\n    return first + second\n\n\nprint(add(1, 22), add(333, 4444))\n",
    "user assistant system tool function You are a helpful assistant. What is the weather in Paris today?",
    "Voilà: naïve café, Größe, 東京の天気, Привет мир, عربى, 👋🏽 hello 🌍!",
] * 3
TEXTS = [
    "",
    " ",
    "   leading and trailing   ",
    "Hello, world! It's 12345.67 o'clock .",
    "\n\n  tabs\tand\r\nnewlines\n",
    "naïve café Größe e\u0301 東京の天気 Привет عربى",
    "👋🏽🌍👨‍👩‍👧 zero\u200bwidth \u00a0 \ufeff \U0010ffff",
    "<|im_start|>user\nhi<|im_end|> <s> [INST] hi [/INST]</s><|eot_id|><|begin_of_text|>text",
    "▁already ▁▁ marked <0x41>",
    "def f(x):\n        return x\n" * 3,
]
MESSAGES = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "  What is 2 + 2? <b>&</b> 'é' 👋 "},
    {"role": "assistant", "content": "It is 4, 👋🏽"},
    {"role": "user", "content": "And in French?", "name": None},
    {"role": "assistant", "content": "    quatre  "},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a <city>, “today's”",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]

CHATML = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}{{- messages[0]['content'] }}{%- else %}{{- 'Be helpful.' }}{%- endif %}
    {{- "\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson(indent=2) }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif not (tools and loop.first and message.role == 'system') %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
LLAMA3 = """{{- bos_token }}
{%- set ns = namespace(system='') %}
{%- if messages[0]['role'] == 'system' %}
    {%- set ns.system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " }}
{{- strftime_now("%d %b %Y") + "\\n" + ns.system + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
MISTRAL = """{%- if messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + (system + '\\n\\n' if loop.first and system is defined else '') }}
        {{- message['content'] + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""
# One line per message, spaces kept: what trim_blocks and lstrip_blocks do shows.
GENERATION = """
    {% for message in messages %}
        {% if message.role == 'assistant' %}
<|im_start|>assistant
            {% generation %}
{{ message.content }}<|im_end|>
            {% endgeneration %}

        {% else %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
        {% endif %}
    {% endfor %}
"""
LOOP_CONTROLS = """{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{% if loop.index > 3 %}{% break %}{% endif %}
{{ message.role }}: {{ message.content }}
{% endfor %}
{{ documents is none }} {{ tools is none }} {{ style | default('plain') }}"""
REASONING = "{% for m in messages %}<{{ m.thinking }}|{{ m.reasoning_content }}>{{ m.content }}{% endfor %}"
TEMPLATES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "generation": GENERATION,
    "loop_controls": LOOP_CONTROLS,
    "reasoning": REASONING,
}


def byte_level(special_tokens):
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def metaspace(special_tokens):
    backend = Backend(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", *special_tokens, *byte_tokens], show_progress=False
    )
    backend.train_from_iterator([word for text in CORPUS[:2] for word in text.split()], trainer)
    return backend


def vocabulary(backend):
    model = json.loads(backend.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def save_qwen2(path):
    backend = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = Qwen2Tokenizer(
        **vocabulary(backend), eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>", "<|im_end|>"]
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(path)
    return Qwen2Tokenizer.from_pretrained(path)


def save_llama3(path):
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend = byte_level(["<|begin_of_text|>", "<|end_of_text|>", *headers])
    bos = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), bos])
    backend.enable_truncation(4)
    backend.enable_padding(length=8, pad_id=1, pad_token="<|end_of_text|>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    tokenizer.chat_template = {"default": LLAMA3, "tool_use": CHATML, "other": LOOP_CONTROLS}
    tokenizer.save_pretrained(path)
    return PreTrainedTokenizerFast.from_pretrained(path)


def save_llama2(path):
    backend = metaspace(["<s>", "</s>"])
    LlamaTokenizer(**vocabulary(backend), add_bos_token=True).save_pretrained(path)
    write(path, "tokenizer_config.json", chat_template=MISTRAL, clean_up_tokenization_spaces=True)
    return LlamaTokenizer.from_pretrained(path)


def save_mistral(path):
    """An older directory: no added_tokens_decoder, special_tokens_map.json, flags that tokenizer.json overrules."""
    backend = metaspace(["<s>", "</s>", "[INST]", "[/INST]"])
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    backend.save(str(path / "tokenizer.json"))
    write(
        path,
        "tokenizer_config.json",
        add_bos_token=False,
        add_eos_token=False,
        bos_token={"__type": "AddedToken", "content": "[INST]", "lstrip": False, "normalized": False},
        unk_token="<unk>",
        chat_template=[{"name": "default", "template": MISTRAL}, {"name": "generation", "template": GENERATION}],
    )
    token = {"lstrip": True, "rstrip": False, "normalized": False, "single_word": False}
    write(
        path,
        "special_tokens_map.json",
        bos_token={"content": "<s>"} | token,
        eos_token="</s>",
        pad_token={"content": "<pad>"} | token,
        additional_special_tokens=["<extra>", "[INST]"],
    )
    return PreTrainedTokenizerFast.from_pretrained(path)


SAVERS = {"qwen2": save_qwen2, "llama3": save_llama3, "llama2": save_llama2, "mistral": save_mistral}


def write(directory, name, **fields):
    """Write a JSON file, or more fields into the one that is there."""
    file = directory / name
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | fields))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    pairs = {}
    for name, save in SAVERS.items():
        path = tmp_path_factory.mktemp(name)
        oracle = save(path)
        pairs[name] = (Tokenizer.from_directory(path), oracle, path)
    return pairs


@pytest.fixture(scope="module", params=SAVERS)
def pair(request, saved):
    return saved[request.param][:2]


@pytest.fixture
def directory(tmp_path):
    """A small valid model directory to break."""
    byte_level(["<|endoftext|>"]).save(str(tmp_path / "tokenizer.json"))
    write(tmp_path, "tokenizer_config.json", eos_token="<|endoftext|>")
    return tmp_path


def check_text(tokenizer, oracle, text):
    for special in (True, False):
        ids = tokenizer.encode(text, add_special_tokens=special)
        assert ids == oracle(text, add_special_tokens=special).input_ids
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("text", TEXTS)
def test_text_to_ids_and_back(pair, text):
    check_text(*pair, text)


@given(st.lists(st.text() | st.sampled_from(TEXTS), max_size=3).map("".join))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_to_ids_and_back(pair, text):
    check_text(*pair, text)


@given(st.lists(st.integers(0, 499), max_size=12))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_ids_to_text(pair, ids):
    tokenizer, oracle = pair
    ids = [i % tokenizer.vocab_size for i in ids]
    assert tokenizer.decode(ids) == oracle.decode(ids)
    assert tokenizer.decode(ids, True) == oracle.decode(ids, skip_special_tokens=True)


def test_special_tokens(pair):
    tokenizer, oracle = pair
    for name in ("bos_token", "eos_token", "pad_token", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token"):
        assert getattr(tokenizer, name) == getattr(oracle, name), name
    assert tokenizer.special_tokens_map == oracle.special_tokens_map
    assert tokenizer.vocab_size == len(oracle)
    assert tokenizer.stop_token_ids == (oracle.eos_token_id,)


def test_bos_comes_from_tokenizer_json(saved):
    """add_bos_token and add_eos_token of tokenizer_config.json give way to tokenizer.json."""
    tokenizer = saved["mistral"][0]
    assert tokenizer.encode("x")[0] == tokenizer.bos_token_id
    assert tokenizer.encode("x")[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("convert", [tuple, torch.tensor, np.array, iter])
def test_decode_takes_any_flat_ids(saved, convert):
    tokenizer = saved["qwen2"][0]
    ids = tokenizer.encode("Hello, world!")
    assert tokenizer.decode(convert(ids)) == "Hello, world!"
    assert tokenizer.decode(torch.tensor([], dtype=torch.int64)) == ""


@pytest.mark.parametrize("clean_up", [True, False])
def test_clean_up_of_spaces(tmp_path, clean_up):
    words = ["<unk>", "do", "n't", ",", "it", "'s", "!", "'"]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=clean_up).save_pretrained(tmp_path)
    tokenizer, oracle = Tokenizer.from_directory(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ids = [1, 2, 3, 4, 5, 7, 4, 6, 6]
    assert tokenizer.decode(ids) == oracle.decode(ids)
    assert (" ," in tokenizer.decode(ids)) != clean_up


@pytest.mark.parametrize("split", [True, False])
def test_split_special_tokens(directory, split):
    write(directory, "tokenizer_config.json", split_special_tokens=split)
    tokenizer, oracle = Tokenizer.from_directory(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    check_text(tokenizer, oracle, "one<|endoftext|>two")
    assert (0 in tokenizer.encode("one<|endoftext|>two")) != split


def test_tokens_only_tokenizer_config_lists(directory):
    token = {"lstrip": False, "rstrip": True, "normalized": False, "single_word": False}
    listed = {"501": {"content": "<b>", "special": False} | token, "500": {"content": "<a>", "special": True} | token}
    fields = {"added_tokens_decoder": listed, "pad_token": "<pad>", "extra_special_tokens": ["<c>"]}
    write(directory, "tokenizer_config.json", **fields)
    write(directory, "special_tokens_map.json", pad_token="<ignored>")
    tokenizer, oracle = Tokenizer.from_directory(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    check_text(tokenizer, oracle, "x <a> y <b> z <pad> w <c>.")
    assert (tokenizer.pad_token_id, tokenizer.vocab_size) == (oracle.pad_token_id, len(oracle))


@pytest.mark.parametrize(
    ("generation_config", "config", "expected"),
    [
        ({"eos_token_id": [7, 5, 7]}, {"eos_token_id": 3}, (7, 5, 3, 0)),
        ({"eos_token_id": 9}, {}, (9, 0)),
        ({"temperature": 1.0}, {"eos_token_id": 3}, (3, 0)),
        ({"eos_token_id": None}, {"eos_token_id": [3, 0, 4]}, (3, 0, 4)),
        (None, {"eos_token_id": None}, (0,)),
        (None, None, (0,)),
    ],
)
def test_stop_token_ids(directory, generation_config, config, expected):
    """A completion ends at whatever any of the files calls an end: both configs' ids, then the tokenizer's own, 0."""
    for name, fields in (("generation_config.json", generation_config), ("config.json", config)):
        if fields is not None:
            write(directory, name, **fields)
    assert Tokenizer.from_directory(directory).stop_token_ids == expected


def test_no_stop_token_ids(directory):
    (directory / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.from_directory(directory)
    assert (tokenizer.stop_token_ids, tokenizer.eos_token, tokenizer.chat_template) == ((), None, None)


def check_chat(tokenizer, oracle, messages, **arguments):
    """Same text and ids as Transformers', or a refusal from both; the text, or None for a refusal."""
    try:
        expected = oracle.apply_chat_template(messages, tokenize=False, **arguments)
    except Exception:
        with pytest.raises(InputError):
            tokenizer.apply_chat_template(messages, **arguments)
        return None
    assert tokenizer.apply_chat_template(messages, tokenize=False, **arguments) == expected
    ids = oracle.apply_chat_template(messages, return_dict=False, **arguments)
    assert tokenizer.apply_chat_template(messages, **arguments) == ids
    return expected


@pytest.mark.parametrize("template", TEMPLATES)
def test_chats(pair, template):
    arguments = {"chat_template": TEMPLATES[template]}
    for length in range(1, len(MESSAGES) + 1):
        for chat in (MESSAGES[:length], MESSAGES[1 : length + 1]):
            check_chat(*pair, chat, **arguments, add_generation_prompt=True)
            check_chat(*pair, chat, **arguments, tools=TOOLS)
    text = check_chat(*pair, MESSAGES, **arguments, style="baroque", bos_token="<<BOS>>", documents=[{"text": "x"}])
    assert text
    assert "None" not in text or template == "reasoning"


def test_own_template_and_names(saved):
    tokenizer, oracle, _ = saved["llama3"]
    default = check_chat(tokenizer, oracle, MESSAGES)
    with_tools = check_chat(tokenizer, oracle, MESSAGES, tools=TOOLS)
    other = check_chat(tokenizer, oracle, MESSAGES, chat_template="other")
    assert "Today" in default
    assert "<tools>" in with_tools
    assert "user: " in other
    assert tokenizer.chat_template == LLAMA3
    for name in ("qwen2", "llama2", "mistral"):
        assert check_chat(*saved[name][:2], MESSAGES)


def test_tool_calls_and_nones(saved):
    call = {"function": {"name": "weather", "arguments": {"city": "Zürich <&>", "days": [1, 2.5, None, True]}}}
    chat = [
        {"role": "user", "content": "Weather?", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "{}"},
    ]
    text = check_chat(*saved["qwen2"][:2], chat, tools=TOOLS)
    assert '"Zürich <&>"' in text


def test_reasoning_goes_by_each_name(saved):
    for name in ("reasoning_content", "thinking", "reasoning"):
        text = check_chat(*saved["qwen2"][:2], [{"role": "user", "content": "x", name: "why"}], chat_template=REASONING)
        assert text == "<why|why>x"


def test_values_reach_the_template_as_plain_types(saved):
    class Role(str, enum.Enum):  # noqa: UP042  its str() is not its value
        USER = "user"

    chat = [{"role": Role.USER, "content": np.str_("hi")}]
    text = check_chat(
        *saved["qwen2"][:2], chat, chat_template="{{ messages[0] }} {{ n }} {{ t }}", n=np.float64(2), t=(1,)
    )
    assert text == "{'role': 'user', 'content': 'hi'} 2.0 (1,)"


@pytest.mark.parametrize("template", ["chatml", "llama3", "generation", "mistral"])
@pytest.mark.parametrize("content", ["It is", "It is  ", "", "  \n", "x<|im_end|>y"])
def test_continue_final_message(pair, template, content):
    chat = [*MESSAGES[:2], {"role": "assistant", "content": content}]
    text = check_chat(*pair, chat, chat_template=TEMPLATES[template], continue_final_message=True)
    assert text.rstrip().endswith(content.rstrip())


def test_continue_final_message_in_parts(saved):
    template = "{% for m in messages %}<{% for part in m.content %}{{ part.text }}{% endfor %}>{% endfor %}"
    chat = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]
    arguments = {"chat_template": template, "continue_final_message": True}
    assert check_chat(*saved["qwen2"][:2], chat, **arguments) == "<a"
    assert chat[0]["content"][0]["text"] == "a"


def test_mask_of_generated_tokens(pair):
    tokenizer, oracle = pair
    # Transformers drops the rest of an answer whose first token's offsets leave out a space, and of one that ends in
    # a character of several tokens: see test_mask_covers_whole_answers.
    chat = [m | {"content": m["content"].replace("👋🏽", "yes").strip()} for m in MESSAGES]
    ids, mask = tokenizer.apply_chat_template_with_mask(chat, chat_template=GENERATION)
    assert ids == tokenizer.apply_chat_template(chat, chat_template=GENERATION)
    assert set(mask) == {0, 1}
    expected = oracle.apply_chat_template(chat, chat_template=GENERATION, return_assistant_tokens_mask=True)
    assert (ids, mask) == (expected["input_ids"], expected["assistant_masks"])


def test_mask_covers_whole_answers(pair):
    """Also where an answer ends in a character of several tokens, or holds tokens that are nothing but spaces."""
    tokenizer, _ = pair
    template = "{% for m in messages %}[{% generation %}{{ m.content }}{% endgeneration %}]\n{% endfor %}"
    contents = ["if x:\n        return 👋🏽", "東京", "a  b   c"]
    chat = [{"role": "assistant", "content": content} for content in contents]
    ids, mask = tokenizer.apply_chat_template_with_mask(chat, chat_template=template)
    inside = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert inside.strip() == "".join(contents)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ strftime_now.__code__.co_consts[0] }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ messages | map(attribute='__class__') | first | attr('__subclasses__')() }}",
        "{% include '/etc/passwd' %}",
        "{{ range(10**9) | list }}",
    ],
)
def test_templates_stay_in_the_sandbox(saved, template):
    with pytest.raises(InputError, match="chat_template: "):
        saved["qwen2"][0].apply_chat_template(MESSAGES, chat_template=template)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only users here') }}", "only users here"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ 'a' + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% generation %}x", "TemplateSyntaxError"),
        (7, "found int 7"),
    ],
)
def test_template_errors(saved, template, message):
    with pytest.raises(InputError, match=f"chat_template: .*{message}"):
        saved["qwen2"][0].apply_chat_template(MESSAGES, chat_template=template)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"messages": []}, "messages: found list"),
        ({"messages": "hi"}, "messages: found str"),
        ({"messages": None}, "messages: found NoneType"),
        ({"messages": ["hi"]}, r"messages\[0\]: found str"),
        ({"messages": [MESSAGES]}, r"messages\[0\]: found list"),
        ({"messages": [MESSAGES[0], {"content": "x"}]}, r'messages\[1\].*string "role"'),
        ({"messages": [{"role": "user", "content": object()}]}, r"messages\[0\]\['content'\]: found object"),
        ({"tools": TOOLS[0]}, "tools: found dict"),
        ({"tools": [print]}, "tools: found list"),
        ({"style": {1, 2}}, "style: found set"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message: "),
        ({"messages": [{"role": "assistant"}], "continue_final_message": True}, r"messages\[0\]\['content'\]"),
        ({"continue_final_message": True, "chat_template": "fixed"}, "continue_final_message: "),
    ],
)
def test_malformed_chats(saved, arguments, message):
    with pytest.raises(InputError, match=message):
        saved["qwen2"][0].apply_chat_template(**{"messages": MESSAGES} | arguments)


def test_mask_needs_generation_blocks(saved):
    with pytest.raises(InputError, match="generation"):
        saved["qwen2"][0].apply_chat_template_with_mask(MESSAGES)


def test_no_template(directory):
    with pytest.raises(InputError, match=r"chat_template\.jinja.*tokenizer_config\.json"):
        Tokenizer.from_directory(directory).apply_chat_template(MESSAGES)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.apply_chat_template(MESSAGES, tools=[], tokenize=False) == "[]"
    with pytest.raises(InputError, match="tool_use"):
        tokenizer.apply_chat_template(MESSAGES)


def test_where_templates_come_from(directory):
    write(directory, "chat_template.json", chat_template="json")
    assert Tokenizer.from_directory(directory).chat_template == "json"
    write(directory, "tokenizer_config.json", chat_template="config")
    assert Tokenizer.from_directory(directory).chat_template == "config"
    (directory / "chat_template.jinja").write_text("jinja")
    assert Tokenizer.from_directory(directory).chat_template == "jinja"


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["list"], "a\ud800"])
def test_malformed_text(saved, text):
    with pytest.raises(InputError, match="text: found"):
        saved["qwen2"][0].encode(text)


@pytest.mark.parametrize(
    "ids", [[10**6], [-1], [2**40], ["1"], [1.0], 5, None, [[1, 2]], torch.tensor(3), torch.ones(2), torch.ones(1, 2)]
)
def test_malformed_ids(saved, ids):
    with pytest.raises(InputError, match=r"ids(\[0\])?: found"):
        saved["qwen2"][0].decode(ids)


BROKEN_FILES = {
    ("tokenizer.json", None): "tokenizer.json: no such file",
    ("tokenizer.json", "{"): "tokenizer.json",
    ("tokenizer.json", "{}"): "tokenizer.json",
    ("tokenizer.json", b"\xff\xfe"): "tokenizer.json: found bytes",
    ("tokenizer_config.json", "{"): "tokenizer_config.json: not JSON",
    ("tokenizer_config.json", "[]"): "tokenizer_config.json: found list",
    ("tokenizer_config.json", '{"eos_token": 5}'): "tokenizer_config.json: eos_token: found int 5",
    ("tokenizer_config.json", '{"eos_token": {"lstrip": true}}'): "tokenizer_config.json: eos_token: found dict",
    ("tokenizer_config.json", '{"eos_token": {"content": 3}}'): "tokenizer_config.json: eos_token: found dict",
    ("tokenizer_config.json", '{"chat_template": 5}'): "tokenizer_config.json: chat_template: found int",
    (
        "tokenizer_config.json",
        '{"chat_template": [{"name": "x"}]}',
    ): "tokenizer_config.json: chat_template: found dict",
    ("tokenizer_config.json", '{"clean_up_tokenization_spaces": "no"}'): "clean_up_tokenization_spaces: found str",
    ("tokenizer_config.json", '{"added_tokens_decoder": []}'): "added_tokens_decoder: found list",
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": "y"}}'): "added_tokens_decoder: found list",
    ("tokenizer_config.json", '{"added_tokens_decoder": {"1": 2}}'): "added_tokens_decoder: found int",
    ("tokenizer_config.json", '{"extra_special_tokens": "x"}'): "extra_special_tokens: found str",
    ("special_tokens_map.json", '{"pad_token": ["x"]}'): "special_tokens_map.json: pad_token: found list",
    ("generation_config.json", '{"eos_token_id": "2"}'): "generation_config.json: eos_token_id: found str",
    ("generation_config.json", '{"eos_token_id": [1, true]}'): "generation_config.json: eos_token_id: found list",
    ("config.json", '{"eos_token_id": -1}'): "config.json: eos_token_id: found int -1",
    ("config.json", "nonsense"): "config.json: not JSON",
    ("chat_template.json", '{"chat_template": {}}'): "chat_template.json: chat_template: found dict",
    ("chat_template.jinja", b"\xff"): "chat_template.jinja: found bytes",
}


@pytest.mark.parametrize(("file", "content"), BROKEN_FILES)
def test_broken_files(directory, file, content):
    if content is None:
        (directory / file).unlink()
    else:
        (directory / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        Tokenizer.from_directory(directory)
    assert BROKEN_FILES[file, content] in str(caught.value)
    assert str(directory / file) in str(caught.value)


def test_not_a_directory(tmp_path):
    with pytest.raises(InputError, match="not a directory"):
        Tokenizer.from_directory(tmp_path / "absent")
