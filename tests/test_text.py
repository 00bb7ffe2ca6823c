"""From a conversation to ids and labels, with tokenizers of every kind."""

import json
import re
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import (
    LLAVA_HF,
    REAL,
    TOKENIZERS,
    byte_level,
    messages_of,
    noise,
    open_dataset,
    row,
    sentencepiece,
    with_image,
    write,
)
from tokenizers import Tokenizer, models
from transformers import AutoProcessor, ByT5Tokenizer, PreTrainedTokenizerFast

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

# What stands before the conversation, its turns, an answer as rendered, what stands behind it.
FORMATS = {
    "v1": ("{system} ", "USER: {q} ASSISTANT:", " {a}{eos}", ""),
    "llava_llama_2": ("[INST] ", "{system}{q} [/INST]", " {a} {eos}", "{bos}[INST] "),
    "chatml_direct": (
        "<|im_start|>system\n{system}<|im_end|>",
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
    """(prompts, answers): the text in pieces; the last prompt is what follows the last answer."""
    start, prompt, answer, behind = FORMATS[version]
    system, prompts, answers = SYSTEMS[version] if system is None else system, [], []
    if version == "llava_llama_2":
        system = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    words = {"bos": tokenizer.bos_token or "", "eos": tokenizer.eos_token}
    for i, (q, a) in enumerate(turns):
        head = (start if i == 0 else behind) + prompt
        prompts.append(head.format(q=q, system=system if i == 0 else "", **words))
        answers.append(answer.format(a=a, **words))
    end = behind if version == "qwen" else ""
    return [*prompts, end], answers


def plain_ids(tokenizer, text):
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
def test_ids_are_the_tokenizers_and_labels_the_answers(tokenizer, version, system):
    text = chat_text(tokenizer, version)
    for n in (1, 2, 3):
        prompts, answers = render(version, tokenizer, TURNS[:n], system)
        messages = messages_of(TURNS[:n], system)
        whole = "".join(p + a for p, a in zip(prompts, [*answers, ""]))
        assert text.render(messages) == whole
        ids, labels = text.ids_and_labels(messages)
        assert ids == plain_ids(tokenizer, whole)
        if tokenizer.bos_token and version != "llava_llama_2":  # that one has one in each turn
            assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        assert supervised(text, messages) == answers
        for k in range(n):  # asked as it was taught, and as anyone else asks
            asked = messages[: len(messages) - 2 * (n - k) + 1]
            prompt = text.ids_and_labels(asked, prompt=True)[0]
            assert prompt == ids[: len(prompt)]
            assert labels[len(prompt)] != IGNORE == labels[len(prompt) - 1]
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
def test_own_template_gives_the_ids_that_it_gives_anyone(tokenizer, template):
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


def test_plain_is_picture_and_caption_without_end_token(tokenizer):
    text = ChatText(tokenizer, "plain")
    ids, _ = text.ids_and_labels(messages_of(TURNS[:1]))
    assert ids == tokenizer(f"{IMAGE}A frog.\n").input_ids and tokenizer.eos_token_id not in ids
    captions = [a.lstrip(" ") for a in supervised(text, messages_of(TURNS[:1]))]
    assert captions == ["A frog.\n"]  # a legacy tokenizer puts a space in front
    assert text.chat_template is None and ids[-1] in text.stop_ids
    for wrong in (TURNS[:2], TURNS[1:2]):
        with pytest.raises(ValueError, match="--version plain takes one picture and one answer"):
            text.ids_and_labels(messages_of(wrong))
    with pytest.raises(ValueError, match="--version plain takes"):
        text.ids_and_labels(messages_of(TURNS[:1], "Be short."))


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
def test_saved_template_takes_strings_and_parts_with_equal_ids(template):
    tokenizer = sentencepiece("<unk>", legacy=False)
    text = chat_text(tokenizer, template)
    said, picture = {"type": "text", "text": "What is it?"}, {"type": "image"}
    contents = [f"{IMAGE}\nWhat is it?", f"What is it?\n{IMAGE}", f"What {IMAGE}is it?"]
    ours = text.ids_and_labels(messages_of(TURNS)[:1], prompt=True)[0]
    for content in (*contents, [picture, said], [said, picture]):  # the picture goes first
        asked = [{"role": "user", "content": content}]
        theirs = tokenizer.apply_chat_template(asked, add_generation_prompt=True).input_ids
        assert ours in (theirs, text.bos + theirs)
        if isinstance(content, str):
            assert text.ids_and_labels(asked, prompt=True)[0] == ours
    assert ours.count(1) == 1 == ours.count(text.image_token_id)
    assert ChatText(tokenizer).chat_template == tokenizer.chat_template  # taken as it is
    ends = "</s>", "<|im_end|>"
    answers = [s.strip().removesuffix(ends[0]).removesuffix(ends[1]).strip()
               for s in supervised(text, messages_of(TURNS))]  # fmt: skip
    assert answers == [a for _, a in TURNS]


def test_several_pictures_of_a_turn_stay_where_they_stand():
    text = chat_text(byte_level(), "v1")
    asked = [{"role": "user", "content": f"Is {IMAGE} like {IMAGE}?"}]
    ids = text.ids_and_labels(asked, prompt=True)[0]
    assert f"{IMAGE} like {IMAGE}" in text.tokenizer.decode(ids)
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Alike?"}]
    parts, words = ([{"role": "user", "content": c}] for c in (parts, f"{IMAGE}\n{IMAGE}\nAlike?"))
    theirs = text.tokenizer.apply_chat_template(parts, add_generation_prompt=True)
    assert theirs.input_ids == text.ids_and_labels(words, prompt=True)[0]


@pytest.mark.parametrize("version", SYSTEMS)
def test_named_templates_have_one_start_token_in_two_steps(version):
    tokenizer = sentencepiece("<unk>", legacy=False)
    text = chat_text(tokenizer, version)
    asked = messages_of(TURNS)[:1]
    words = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert tokenizer(words).input_ids == text.ids_and_labels(asked, prompt=True)[0]


DROPS_THINKING = CHATML.replace(
    "message['content']", "message['content'].split('</think>')[-1].lstrip('\\n')"
)


@pytest.mark.parametrize(
    "template, error",
    [
        (LLAVA_HF, "of the answer 'A1x', or does not end it: .*--version v1"),
        (NO_PREFIX, "begins its answer unlike .* --version v1"),
        (
            CHATML.replace("assistant\n' }}{% endif", "assistant\n ' }}{% endif"),
            "begins its answer unlike",
        ),
        (None, "no chat template: .* --version v1"),
        ("{{ messages[0].content.nothing.at_all }}", "the chat template refuses"),
        ("{{ 1 / 0 }}", "the chat template refuses"),
        ("{{ 'Hello' }}</s>", "drops the user turn"),
        (
            CHATML.replace("message['content']", "message['content'] | replace('A', '')"),
            "makes '1x' of",
        ),
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content }}"
            "{{ '</s>' if loop.last and m.role != 'user' else '\n' }}{% endfor %}"
            "{{ 'assistant:' if add_generation_prompt else '' }}",
            "of the answer 'A1x', or does not end it",
        ),
        (
            "{% for m in messages %}{{ m.role + ': ' + m.content }}"
            "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
            "{{ 'assistant: ' if add_generation_prompt else '' }}",
            "' A' is one token, half an answer's",
        ),
    ],
)
@pytest.mark.parametrize("make", ["bytes", "sentencepiece legacy, pad = unk"])
def test_template_that_cannot_teach_is_refused_in_one_line(make, template, error):
    with pytest.raises(ValueError, match=error) as refused:
        chat_text(TOKENIZERS[make](), template)
    assert "\n" not in str(refused.value)


def test_system_turns_that_a_template_refuses_or_drops_are_named():
    for template, error in (
        (NO_SYSTEM, "refuses this conversation: System role not supported"),
        (DROPS_SYSTEM, "drops the system turn"),
    ):
        text = chat_text(byte_level(), template)
        assert supervised(text, messages_of(TURNS)) == [a + "<|im_end|>" for _, a in TURNS]
        with pytest.raises(ValueError, match=error):
            text.ids_and_labels(messages_of(TURNS, "Be short."))


def test_system_text_before_the_last_question_is_found():
    late = CHATML.replace("message['content']", "(messages[0].content + '\n\n' if loop.last and "
        "messages[0].role == 'system' else '') + message['content']").replace(
        "%}{{'", "%}{% if message.role != 'system' %}{{'", 1).replace("{% endfor", "{% endif %}{% endfor")  # fmt: skip
    for template in (late.replace("loop.last", "loop.revindex == 2"), CHATML):
        text = chat_text(byte_level(), template)
        answers = supervised(text, messages_of(TURNS, "Be short."))
        assert answers == [a + "<|im_end|>" for _, a in TURNS]


def test_system_text_that_looks_like_turns_teaches_nothing():
    text = chat_text(byte_level(), "v1")
    messages = messages_of(
        [("Hi", "yes"), ("Hi", "no")], "Say: Hi ASSISTANT: x USER: Hi ASSISTANT:"
    )
    assert supervised(text, messages) == [" yes<|im_end|>", " no<|im_end|>"]


def test_thinking_block_that_a_template_adds_belongs_to_the_answer():
    template = CHATML.replace(
        "message['content']",
        "('<think></think>' if loop.last and message.role == 'assistant' else '') + "
        "message['content']",
    )
    text = chat_text(byte_level(), template)
    wanted = ["A frog.<|im_end|>", "<think></think>On a leaf, at 12:30.<|im_end|>"]
    assert supervised(text, messages_of(TURNS[:2])) == wanted


def test_dropped_thinking_hinders_no_prompt_and_is_named_in_training():
    text = chat_text(byte_level(), DROPS_THINKING)
    said = messages_of([("Hi?", "<think>\nhm\n</think>\n\nYes."), ("So?", "No.")])
    asked, _ = text.ids_and_labels(said[:3], prompt=True)
    theirs = text.tokenizer.apply_chat_template(said[:3], add_generation_prompt=True).input_ids
    assert asked == theirs and "hm" not in text.tokenizer.decode(asked)
    with pytest.raises(ValueError, match="makes 'Yes.' of the answer '<think>.*Yes.'"):
        text.ids_and_labels(said)


def test_tokenizers_that_lack_what_is_needed_are_refused():
    bare = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "<|im_end|>": 2}, unk_token="<unk>"))
    bare = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="</s>", unk_token="<unk>")
    with pytest.raises(ValueError, match="needs a special token <image>"):
        ChatText(bare, "chatml_direct")
    with pytest.raises(ValueError, match="or does not end it"):  # <|im_end|> is a word like others
        ChatText(with_image(bare), "chatml_direct")
    with pytest.raises(ValueError, match="ByT5Tokenizer is slow"):
        ChatText(with_image(ByT5Tokenizer()), "v1")


ODD = [
    "ASSISTANT: ", "\nA frog.", "\n\n", "", "   ", " a", "Q ", "[INST] x [/INST]", "</s", "/s>",
    "USER: x ASSISTANT: y USER:", "naïve 数字 🙂", "<0x0A>", "\ta\r\n"]  # fmt: skip


def learnt(answer):
    """An answer without the empty lines in front."""
    head = answer[: len(answer) - len(answer.lstrip())]
    return answer[max(head.rfind("\n"), head.rfind("\r")) + 1 :]


@pytest.mark.parametrize("version", FORMATS)
def test_odd_answers_are_taught_as_they_are(tokenizer, version):
    text = chat_text(tokenizer, version)
    for odd in ODD:
        turns = [(f"{IMAGE}\n{odd}".strip(), learnt(odd)), ("Where?", learnt(odd))]
        messages = messages_of([(f"{odd} {IMAGE}", odd), ("Where?", odd)])
        ids = text.ids_and_labels(messages)[0]
        wanted = render(
            version, tokenizer, [(f"{IMAGE}\n{odd.strip()}".strip(), turns[0][1]), turns[1]]
        )
        assert supervised(text, messages) == wanted[1], odd
        prompt = text.ids_and_labels(messages[:3], prompt=True)[0]
        assert prompt == ids[: len(prompt)], odd


@pytest.mark.parametrize("words", ["<|im_end|>", "x<|im_start|>user\nhi", "a <s> b"])
def test_control_strings_are_refused_in_any_turn(words):
    text = chat_text(byte_level(), "v1")
    for turns, system in (([("Hi", words)], None), ([(words, "x")], None), ([("a", "b")], words)):
        with pytest.raises(ValueError, match="text holds <.*>, a control string: remove it"):
            text.ids_and_labels(messages_of(turns, system))
    for turns, system in (([("Hi", IMAGE)], None), ([("a", "b")], IMAGE)):
        with pytest.raises(ValueError, match="text holds <image>, a control string"):
            text.ids_and_labels(messages_of(turns, system))


texts = st.lists(
    st.one_of(
        st.sampled_from(["frog", " ", "\n", "  ", ".", "USER:", "ASSISTANT:", *ODD]),
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=4),
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
    try:
        ids, _ = text.ids_and_labels(messages)
    except ValueError as error:  # "\na" is a piece of the tokenizer that was trained here
        assert re.search("control string|is one token, half an answer's", str(error))
        return
    wanted = render(version, text.tokenizer, [(q, learnt(a)) for q, a in turns])[1]
    assert supervised(text, messages) == wanted
    assert ids.count(text.image_token_id) == 0
    prompt = text.ids_and_labels(messages[:-1], prompt=True)[0]
    assert prompt == ids[: len(prompt)]


def test_time_grows_with_the_number_of_turns_not_its_square():
    text, turns = (
        chat_text(byte_level(), QWEN),
        [(f"What is {i}?", f"It is {i}.") for i in range(400)],
    )

    def seconds(count):
        began = time.process_time()
        text.ids_and_labels(messages_of(turns[:count]))
        return time.process_time() - began

    ratio = min(seconds(400) / seconds(50) for _ in range(5))
    assert ratio < 16  # 8 is linear


def test_processor_of_a_folder_gives_the_same_ids_and_pixels(tiny, tmp_path):
    noise(400, 300).save(tmp_path / "a.png")
    picture = {"type": "image", "path": str(tmp_path / "a.png")}
    question = {"type": "text", "text": "What is it?"}
    rows = write(tmp_path / "a.json", json.dumps([row([TURNS[0][0], "A frog."], image="a.png")]))
    dataset = open_dataset(rows, tmp_path, tiny)
    ours = data.Collator(dataset.image_token_id, 576)([dataset[0]])
    processor = AutoProcessor.from_pretrained(tiny)
    for parts in ([picture, question], [question, picture]):
        theirs = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
        prompt = theirs["input_ids"].shape[1]
        assert ours["input_ids"][:, :prompt].equal(theirs["input_ids"])
        assert (ours["labels"][0, :prompt] == IGNORE).all()
        assert ours["labels"][0, prompt] != IGNORE
        assert (ours["pixel_values"] - theirs["pixel_values"]).abs().max() < 1e-5
