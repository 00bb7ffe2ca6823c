"""From a conversation to ids and labels, with tokenizers of every kind."""

import json
from collections import Counter

import pytest
from conftest import (
    LLAVA_HF,
    REAL,
    TOKENIZERS,
    byte_level,
    messages_of,
    noise,
    row,
    sentencepiece,
    with_image,
    write,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoProcessor, PreTrainedTokenizerFast

import data
from data import IGNORE, IMAGE, ChatText


@pytest.mark.long
def test_real_vocabularies_have_the_known_ids():
    qwen = REAL["Qwen"]()
    text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|im_start|>assistant"
    assert qwen(text).input_ids == [
        *(151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198),
        *(151644, 872, 198, 151644, 77091),
    ]
    mistral = REAL["Mistral, pad = unk"]()
    assert mistral("Hello, my name is").input_ids == [1, 22557, 28725, 586, 1141, 349]


SYSTEMS = {
    "v1": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions.",
    "llava_llama_2": "You are a helpful language and vision assistant. You are able to understand the visual content "
    "that the user provides, and assist the user with a variety of tasks using natural language.",
    "chatml_direct": "Answer the questions.",
    "qwen": "You are a helpful assistant.",
}

# facts.md B3: what stands before the conversation, its turns, an answer as it is rendered
FORMATS = {
    "v1": ("{bos}{system} ", "USER: {q} ASSISTANT:", " {a}{eos}", ""),
    "llava_llama_2": ("", "{bos}[INST] {system}{q} [/INST]", " {a} {eos}", ""),
    "chatml_direct": (
        "{bos}<|im_start|>system\n{system}<|im_end|>",
        "<|im_start|>user\n{q}<|im_end|><|im_start|>assistant\n",
        "{a}<|im_end|>",
        "",
    ),
    "qwen": (
        "<|im_start|>system\n{system}<|im_end|>\n",
        "<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n",
        "{a}<|im_end|>",
        "\n",
    ),
}

QWEN = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CHATML = "{% for message in messages %}" + QWEN[QWEN.index("{{'<|im_start|>'") :]

NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + CHATML
)

DROPS_SYSTEM = CHATML.replace("%}{{'", "%}{% if message.role != 'system' %}{{'", 1).replace(
    "{% endfor", "{% endif %}{% endfor"
)

WITH_BOS = "{{ bos_token }}" + CHATML

PARTS = CHATML.replace("message['content']", "message['content'][0]['text']")

NO_PREFIX = CHATML.replace("assistant\n", "assistant\n<think>")


def chat_text(tokenizer, version):
    if version not in data.VERSIONS:
        tokenizer.chat_template, version = QWEN if version == "qwen" else version, "own"
    text = ChatText(tokenizer, version)
    tokenizer.chat_template = text.chat_template  # as in a folder that we write
    return text


def render(version, tokenizer, turns, system=None):
    """(prompts, answers): the text as facts.md B3 has it, in pieces; the last prompt is what follows the last answer."""
    start, prompt, answer, behind = FORMATS[version]
    system, prompts, answers = SYSTEMS[version] if system is None else system, [], []
    if version == "llava_llama_2":
        system = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    words = {"bos": tokenizer.bos_token or "", "eos": tokenizer.eos_token}
    for i, (q, a) in enumerate(turns):
        head = (start if i == 0 else behind) + prompt
        prompts.append(head.format(q=q, system=system if i == 0 else "", **words))
        answers.append(answer.format(a=a, **words))
    return prompts + [behind], answers


def plain_ids(tokenizer, text):
    """The tokenizer's own ids for a whole string, with one start token where the model has one."""
    if tokenizer.bos_token and text.startswith(tokenizer.bos_token):
        return tokenizer(text, add_special_tokens=False).input_ids
    return tokenizer(text).input_ids


def decode(tokenizer, ids):
    lead = tokenizer(
        "a", add_special_tokens=False
    ).input_ids  # its decoder drops the text's first space
    return tokenizer.decode(lead + ids, clean_up_tokenization_spaces=False).removeprefix("a")


def supervised(text, messages):
    """The decoded stretches of labels, one for each answer."""
    ids, labels = text.ids_and_labels(messages)
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels, strict=True))
    spans = [[]]
    for label in labels:
        spans += [[]] if label == IGNORE and spans[-1] else []
        spans[-1] += [label] if label != IGNORE else []
    return [decode(text.tokenizer, span) for span in spans if span]


TURNS = [
    (f"{IMAGE}\nWhat is it?", "A frog."),
    ("Where?", "On a leaf, at 12:30."),
    ("Sure?", "Yes\n\n1. I am"),
]


@pytest.mark.parametrize("version", FORMATS)
@pytest.mark.parametrize("system", [None, "Be short.", ""])
def test_ids_are_the_tokenizers_own_and_labels_the_answers(
    tokenizer, version, system
):  # traps 4, 6, 7, 8, 30, 42, 44, 46; troubles 1, 18
    text = chat_text(tokenizer, version)
    for n in (1, 2, 3):
        prompts, answers = render(version, tokenizer, TURNS[:n], system)
        messages = messages_of(TURNS[:n], system)
        whole = "".join(p + a for p, a in zip(prompts, answers + [""]))
        assert text.render(messages) == whole
        ids, labels = text.ids_and_labels(messages)
        assert ids == plain_ids(tokenizer, whole)
        if (
            tokenizer.bos_token and version != "llava_llama_2"
        ):  # that one has a start token in each turn
            assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        assert supervised(text, messages) == answers
        for k in range(
            n
        ):  # what is asked at inference is what was trained on, and what anyone else feeds
            asked = messages[: len(messages) - 2 * (n - k) + 1]
            prompt = text.ids_and_labels(asked, prompt=True)[0]
            assert (
                prompt == ids[: len(prompt)]
                and labels[len(prompt)] != IGNORE == labels[len(prompt) - 1]
            )
            theirs = tokenizer.apply_chat_template(asked, add_generation_prompt=True).input_ids
            assert prompt in (theirs, text.bos + theirs)


MISTRAL = (  # a start token inside, no system turn
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
    "{% if message.role == 'user' %}{{ '[INST] ' + message.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)

LLAMA_2 = (  # a start token in each turn, contents stripped
    "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}{% set system = messages[0].content %}"
    "{% else %}{% set turns = messages %}{% set system = false %}{% endif %}{% for message in turns %}"
    "{% if loop.index0 == 0 and system != false %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message.content %}"
    "{% else %}{% set content = message.content %}{% endif %}"
    "{% if message.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    "template",
    [QWEN, CHATML, NO_SYSTEM, WITH_BOS, PARTS, MISTRAL, LLAMA_2],
    ids="qwen chatml no_system with_bos parts mistral llama_2".split(),
)
def test_a_folders_own_template_gives_the_ids_that_it_gives_anyone(
    tokenizer, template
):  # traps 4, 6, 44, 46, 47; troubles 1, 18
    if tokenizer.bos_token is None:
        tokenizer.bos_token = "<s>"  # has one, as Qwen2's may, and never puts it in front by itself
    text = chat_text(tokenizer, template)
    tokenizer.chat_template = template  # as anyone else would call it

    def theirs(messages, prompt):
        if template == PARTS:
            messages = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages
            ]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt).input_ids
        return (
            ids if ids[0] == tokenizer.bos_token_id else text.bos + ids
        )  # one start token, always

    for n in (1, 2, 3):
        messages = messages_of(TURNS[:n])
        ids, labels = text.ids_and_labels(messages)
        assert ids == theirs(messages, False)
        answers = [s.strip() for s in supervised(text, messages)]
        ends = {a[len(said) :].strip() for a, (_, said) in zip(answers, TURNS[:n], strict=True)}
        assert [a.startswith(said) for a, (_, said) in zip(answers, TURNS)] == [True] * n
        assert len(ends) == 1 and ends <= {"<|im_end|>", "</s>"}
        prompt = text.ids_and_labels(messages[:-1], prompt=True)[0]
        assert prompt == theirs(messages[:-1], True) == ids[: len(prompt)]
        assert labels[len(prompt)] != IGNORE == labels[len(prompt) - 1]


def test_plain_is_picture_and_caption_without_end_token(tokenizer):  # trap 37
    text = ChatText(tokenizer, "plain")
    ids, labels = text.ids_and_labels(messages_of(TURNS[:1]))
    assert ids == tokenizer(f"{IMAGE}A frog.\n").input_ids and tokenizer.eos_token_id not in ids
    assert [a.lstrip(" ") for a in supervised(text, messages_of(TURNS[:1]))] == [
        "A frog.\n"
    ]  # legacy: a space in front
    assert text.chat_template is None and ids[-1] in text.stop_ids
    for wrong in (
        messages_of(TURNS[:2]),
        messages_of(TURNS[1:2]),
        messages_of(TURNS[:1], "Be short."),
    ):
        with pytest.raises(ValueError, match="--version plain takes one human and one gpt turn"):
            text.ids_and_labels(wrong)


@pytest.mark.parametrize(
    "template",
    [
        QWEN,
        CHATML,
        NO_SYSTEM,
        DROPS_SYSTEM,
        WITH_BOS,
        PARTS,
        {"default": CHATML, "tool_use": "{{ 1 }}"},
        *SYSTEMS,
    ],
)
def test_saved_template_takes_strings_and_parts_with_equal_ids(template, tmp_path):
    tokenizer = sentencepiece("<unk>", legacy=False)
    text = chat_text(tokenizer, template)
    question = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    for content in (TURNS[0][0], question):
        theirs = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        ours = text.ids_and_labels(messages_of(TURNS)[:1], prompt=True)[0]
        assert ours in (theirs.input_ids, text.bos + theirs.input_ids)
        assert ours.count(1) == 1 == ours.count(text.image_token_id)
    once = tokenizer.chat_template
    assert ChatText(tokenizer).chat_template == once  # a folder that we wrote is taken as it is
    answers = [a for _, a in TURNS]
    assert [
        s.strip().removesuffix("</s>").removesuffix("<|im_end|>").strip()
        for s in supervised(text, messages_of(TURNS))
    ] == answers


@pytest.mark.parametrize(
    "template, error",
    [
        (LLAVA_HF, "puts no end token after an answer.* --version v1"),
        (NO_PREFIX, "generation prompt does not begin .* --version v1"),
        (None, "no chat template: .* --version v1"),
        ("{{ messages[0].content.nothing.at_all }}", "the chat template refuses"),
        ("{{ 1 / 0 }}", "the chat template refuses"),
        (
            CHATML.replace("message['content']", "message['content'] | replace('A', '')"),
            "changes an answer",
        ),
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content }}{{ '</s>' if loop.last and m.role != 'user' else '\n' }}{% endfor %}"
            "{{ 'assistant: ' if add_generation_prompt else '' }}",
            "puts no end token",
        ),
    ],
)
def test_template_that_cannot_teach_is_refused_in_one_line(template, error):
    tokenizer = sentencepiece("<unk>", legacy=True)
    with pytest.raises(ValueError, match=error) as refused:
        chat_text(tokenizer, template)
    assert "\n" not in str(refused.value)


def test_system_turn_that_a_template_refuses_or_drops_is_one_clear_line():  # trap 47
    for template, error in (
        (NO_SYSTEM, "refuses this conversation: System role not supported"),
        (DROPS_SYSTEM, "drops the system turn"),
    ):
        text = chat_text(byte_level(), template)
        assert supervised(text, messages_of(TURNS)) == [a + "<|im_end|>" for _, a in TURNS]
        with pytest.raises(ValueError, match=error):
            text.ids_and_labels(messages_of(TURNS, "Be short."))


def test_thinking_block_that_a_template_adds_belongs_to_the_answer():
    template = CHATML.replace(
        "message['content']",
        "('<think></think>' if loop.last and message.role == 'assistant' "
        "else '') + message['content']",
    )
    text = chat_text(byte_level(), template)
    assert supervised(text, messages_of(TURNS[:2])) == [
        "A frog.<|im_end|>",
        "<think></think>On a leaf, at 12:30.<|im_end|>",
    ]


def test_chatml_on_a_tokenizer_without_its_tokens_and_a_tokenizer_without_image_are_refused():  # trap 12
    bare = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "<|im_end|>": 2}, unk_token="<unk>"))
    bare = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>", unk_token="<unk>")
    with pytest.raises(ValueError, match="no token <image>"):
        ChatText(bare, "v1")
    with pytest.raises(ValueError, match="puts no end token"):
        ChatText(with_image(bare), "chatml_direct")
    with pytest.raises(ValueError, match="--version v7: known are plain, v1"):
        ChatText(bare, "v7")


ODD = [
    "ASSISTANT: ",
    "\nA frog.",
    "\n\n",
    "",
    "   ",
    " a",
    "a ",
    "</s>",
    "<|im_end|>",
    f"{IMAGE} is text here",
    "<unk>",
    "<s>",
    "[INST] x [/INST]",
    "USER: x ASSISTANT: y</s>USER:",
    "<|im_start|>user\nhi<|im_end|>\n",
    "naïve 数字 🙂",
    "<<s>>",
    "<|endoftext|>",
    "</s",
    "/s>",
    "<0x0A>",
    "<ima" + IMAGE + "ge>",
    "\ta\r\n",
]


@pytest.mark.parametrize("version", FORMATS)
def test_odd_answers_and_control_strings_are_taught_as_text(tokenizer, version):  # traps 5, 8, 10
    text = chat_text(tokenizer, version)
    control = set(tokenizer.added_tokens_decoder)
    normal = Counter(i for i in text.ids_and_labels(messages_of(TURNS[:2]))[0] if i in control)
    for odd in ODD:
        turns = [(f"{IMAGE}\n" + odd.replace(IMAGE, "x"), odd), ("Where?", odd)]
        ids = text.ids_and_labels(messages_of(turns))[0]
        assert supervised(text, messages_of(turns)) == render(version, tokenizer, turns)[1], odd
        assert Counter(i for i in ids if i in control) == normal, odd
        prompt = text.ids_and_labels(messages_of(turns)[:3], prompt=True)[0]
        assert prompt == ids[: len(prompt)], odd


texts = st.lists(
    st.one_of(
        st.sampled_from(["frog", " ", "\n", "  ", ".", "USER:", "<|im_start|>", *ODD]),
        st.text(
            st.characters(exclude_categories=["Cs"], exclude_characters="▁\U0010ffff"), max_size=4
        ),
    ),
    max_size=5,
).map("".join)

made = {}


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    st.sampled_from(list(TOKENIZERS)),
    st.sampled_from(list(FORMATS)),
    st.lists(st.tuples(texts, texts), min_size=1, max_size=3),
)
def test_any_conversation_teaches_its_answers_and_nothing_else(name, version, turns):
    key = (name, version)
    text = made[key] = made.get(key) or chat_text(TOKENIZERS[name](), version)
    messages = messages_of(turns)
    ids, _ = text.ids_and_labels(messages)
    assert supervised(text, messages) == render(version, text.tokenizer, turns)[1]
    assert ids.count(text.image_token_id) == sum(q.count(IMAGE) for q, _ in turns)
    prompt = text.ids_and_labels(messages[:-1], prompt=True)[0]
    assert prompt == ids[: len(prompt)]


def test_text_that_cannot_be_encoded_is_one_clear_error():
    bare = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "a": 2}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    text = ChatText(
        with_image(
            PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>", unk_token="<unk>")
        ),
        "v1",
    )
    with pytest.raises(ValueError, match="cannot encode a control string"):
        text.ids_and_labels(messages_of([("a", "b </s>")]))
    for text_of_no_character in ("\ud800", "\U0010ffff"):
        with pytest.raises(ValueError, match="no character"):
            chat_text(byte_level(), QWEN).ids_and_labels(messages_of([("a", text_of_no_character)]))


def test_processor_of_a_folder_gives_the_same_ids_and_pixels(tiny, tmp_path):  # trap 43
    noise(400, 300).save(tmp_path / "a.png")
    parts = [
        {"type": "image", "path": str(tmp_path / "a.png")},
        {"type": "text", "text": "What is it?"},
    ]
    theirs = AutoProcessor.from_pretrained(tiny).apply_chat_template(
        [{"role": "user", "content": parts}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    rows = write(tmp_path / "a.json", json.dumps([row([TURNS[0][0], "A frog."], image="a.png")]))
    dataset = data.open_dataset(rows, tmp_path, tiny)
    ours = data.Collator(dataset.image_token_id, 576)([dataset[0]])
    prompt = theirs["input_ids"].shape[1]
    assert (
        ours["input_ids"][:, :prompt].equal(theirs["input_ids"])
        and (ours["labels"][0, :prompt] == IGNORE).all()
    )
    assert (ours["pixel_values"] - theirs["pixel_values"]).abs().max() < 1e-5 and ours["labels"][
        0, prompt
    ] != IGNORE
