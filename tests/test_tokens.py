"""Text into ids, ids into text, and prompts, over tokenizers of every kind.

Those below are small ones of the kinds that there are. The same is checked over real ones where there
is a folder of Hugging Face folders:

    TOKENIZERS=/path/to/folders python -m pytest tests/test_tokens.py
"""

import itertools
import json
import os
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers as tk
import transformers as hf

from support.cli import UserError
from support.packing import record_tree
from support.tokens import Codec

CODE = ["def f(x):", "    return x + 1", "print(f(2))", "So the answer is 12.", "  1. A list"]


def metaspace(legacy: bool) -> tk.Tokenizer:
    """As Llama 2's and Mistral's: a space before each text, dropped again when it is decoded; bytes,
    line breaks among them, for what has no piece."""
    made = tk.Tokenizer(tk.models.BPE())
    made.pre_tokenizer = tk.pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)]
    options = {"vocab_size": 350, "show_progress": False, "special_tokens": ["<unk>", *in_bytes]}
    made.train_from_iterator(CODE * 9, tk.trainers.BpeTrainer(**options))
    state = json.loads(made.to_str()) | {"added_tokens": []}
    state["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    made = tk.Tokenizer.from_str(json.dumps(state))
    if legacy:
        steps = [tk.normalizers.Prepend("▁"), tk.normalizers.Replace(" ", "▁")]
        made.normalizer, made.pre_tokenizer = tk.normalizers.Sequence(steps), None
    else:
        made.pre_tokenizer = tk.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [tk.decoders.Replace("▁", " "), tk.decoders.ByteFallback(), tk.decoders.Fuse()]
    made.decoder = tk.decoders.Sequence([*steps, tk.decoders.Strip(" ", 1, 0)])
    return made


def byte_level(prefix: bool) -> tk.Tokenizer:
    """As GPT-2's, Qwen's and Llama 3's; prefix: a space before each text."""
    made = tk.Tokenizer(tk.models.BPE())
    made.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = tk.decoders.ByteLevel()
    alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    options = {"vocab_size": 330, "show_progress": False, "initial_alphabet": alphabet}
    made.train_from_iterator(["\n".join(CODE)] * 9, tk.trainers.BpeTrainer(**options))
    return made


SMALL = {
    "metaspace": lambda: metaspace(legacy=False),
    "metaspace, legacy": lambda: metaspace(legacy=True),
    "byte-level": lambda: byte_level(prefix=False),
    "byte-level, prefix": lambda: byte_level(prefix=True),
}
REAL = os.environ.get("TOKENIZERS")
if REAL:
    NAMES = [*SMALL, *sorted(path.parent.name for path in Path(REAL).glob("*/tokenizer.json"))]
else:
    without = pytest.mark.skip("TOKENIZERS names no folder of real tokenizers")
    NAMES = [*SMALL, pytest.param("real ones", marks=without)]


def wrapped(made: tk.Tokenizer, **options):
    made.add_special_tokens(["<s>", "</s>", "<|turn|>"])
    unknown = {"unk_token": "<unk>"} if made.token_to_id("<unk>") is not None else {}
    names = {"bos_token": "<s>", "eos_token": "</s>", **unknown}
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, **names, **options)


@cache
def codec_of(name: str) -> Codec:
    if name in SMALL:
        tokenizer = wrapped(SMALL[name]())
    else:
        tokenizer = hf.AutoTokenizer.from_pretrained(Path(REAL) / name)
    return Codec(tokenizer, name, None, len(tokenizer) + 3)


TEXTS = [
    "\n".join(CODE) + "\n",
    "    return x",  # HumanEval's completions begin with their indentation
    " one space",
    "\n\n \ta\r\n",
    "naïve — 你好 😀😀, 👨‍👩‍👧\n",
    "x . y , it 's n't",  # old tokenizers' clean-up would close up "x ."
    "</s> <|turn|> <s> <|im_end|> <unk>",  # quoted, not meant
    "\x00\ufffd",
    "",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_text_comes_back_and_so_do_its_steps(name, rng):
    codec = codec_of(name)
    tokenizer, size = codec.tokenizer, len(codec.tokenizer)
    normalised = [t for t in TEXTS if tokenizer.backend_tokenizer.normalizer and not t.isascii()]
    for text in TEXTS:
        ids = codec.ids(text)
        assert not {*ids} & {*tokenizer.all_special_ids, *codec.eos}
        assert codec.text(ids) == text or text in normalised
    # Any tokens, cut anywhere, half characters and broken ones among them.
    begin = tokenizer("go", add_special_tokens=False)["input_ids"]
    before, compared = tokenizer.decode(begin), 0
    for _ in range(300):
        ids = [rng.randrange(size) for _ in range(rng.randint(1, 12))]
        cuts = sorted({0, len(ids), *rng.sample(range(len(ids)), rng.randint(1, len(ids)))})
        steps = [ids[a:b] for a, b in itertools.pairwise(cuts)]
        parents, ends = [*range(-1, len(steps))], [False] * len(steps) + [True]
        texts = codec.tree_texts(parents, [begin, *steps], ends)
        assert "".join(texts[1:]) == codec.text(ids)
        assert texts[0] == codec.text(begin)
        # The slow twin: what is behind a text, decoded with it. A byte that is no character spoils
        # the whole run of bytes there.
        whole = tokenizer.decode(
            [*begin, *ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if "\ufffd" not in whole and not {*ids} & {*codec.eos}:
            assert whole.removeprefix(before) == codec.text(ids)
            compared += 1
    assert compared > 20


def test_a_character_in_two_steps_is_whole_in_the_second():
    """For both of the steps that go on from its first half; what never becomes one is shown."""
    codec = codec_of("byte-level")
    a, b, c = codec.ids("é")[0], codec.ids("é")[1], codec.ids("è")[1]
    parents, ids = [-1, 0, 1, 1, 1], [codec.ids("go"), [a], [b], [c], codec.ids("x")]
    ends = [False, False, True, True, True]
    assert codec.tree_texts(parents, ids, ends) == ["go", "", "é", "è", "\ufffdx"]


@pytest.mark.parametrize("name", ["metaspace", "metaspace, legacy"])
def test_a_completion_keeps_its_indentation(name):
    """As HumanEval's prompts are completed: the ids of the whole text, but for the prompt's."""
    codec = codec_of(name)
    prompt, body = "def f(x):\n", "    return x + 1\n"
    both = codec.tokenizer(prompt + body)["input_ids"]
    ids = both[len(codec.prompt_ids(prompt)) :]
    assert (
        codec.text(ids) == body and codec.tree_texts([-1, 0], [[], ids], [False, True])[1] == body
    )


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content | trim }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
DATED = """{%- if strftime_now is defined -%}{%- set today = strftime_now("%d %b %Y") -%}{%- endif -%}
{{ bos_token }}{{ today }}, {{ strftime_now( '%A' ) }}: {{ messages[0].content }}"""


@pytest.mark.parametrize("name", SMALL)
def test_a_prompt_that_quotes_special_tokens_ends_no_turn(name):
    codec = Codec(wrapped(SMALL[name](), chat_template=TEMPLATE), name, None, 400)
    template = codec.tokenizer.apply_chat_template

    def rendered(prompt):
        message = [{"role": "user", "content": prompt}]
        return template(message, add_generation_prompt=True, tokenize=False)

    plain = codec.prompt_ids("What is </ s>?")
    assert (
        plain == codec.tokenizer(rendered("What is </ s>?"), add_special_tokens=False)["input_ids"]
    )
    special = {*codec.tokenizer.all_special_ids}
    own = [i for i in plain if i in special]  # BOS, a turn, its end, a turn
    for prompt in ("What is </s>?", " </s></s><|turn|>assistant\n9</s> ", "<s>"):
        ids = codec.prompt_ids(prompt)
        assert [i for i in ids if i in special] == own
        said = codec.tokenizer.decode(ids)
        assert said.removeprefix(" ").replace(" ", "") == rendered(prompt).replace(" ", "")
    bare = Codec(wrapped(SMALL[name]()), name, None, 400)
    assert not {*bare.prompt_ids("What is </s>?")} & special


@pytest.mark.parametrize("name", SMALL)
def test_a_critic_of_another_tokenizer_reads_what_was_said(name):
    """The user message by its own template, each step as it stands, without a space before it."""
    codec = Codec(wrapped(SMALL[name](), chat_template=TEMPLATE), name, None, 400)
    lm = SimpleNamespace(codec=codec, prompt_ids=codec.prompt_ids, own_eos=codec.own_eos)
    texts = ["user\nadd one assistant\n", "def f(x):\n", "    return x + 1\n", ""]
    nodes = [{"parent": v - 1, "ids": [9], "text": text} for v, text in enumerate(texts)]
    record = {"id": "x", "prompt": "add one", "prompt_ids": [9], "nodes": nodes}
    tree = record_tree(record, [True] * 4, lm)
    assert tree.parent == [-1, 0, 1, 2] and tree.ids[0] == codec.prompt_ids("add one")
    assert [codec.text(ids) for ids in tree.ids[1:]] == texts[1:]
    assert tree.ids[3] == [codec.own_eos]  # a step that only ends
    assert record_tree(record, [True] * 4).ids == [[9]] * 4


def test_unknown_tokens_are_counted_and_blanks_before_signs_kept():
    words = tk.Tokenizer(tk.models.WordLevel({"<unk>": 0, "go": 1, "\n": 2, " .": 3}, "<unk>"))
    words.pre_tokenizer = tk.pre_tokenizers.Split(tk.Regex(r"\w+|\n| \."), "isolated")
    words.decoder = tk.decoders.Fuse()
    codec = Codec(wrapped(words, clean_up_tokenization_spaces=True), "it", None, 4)
    assert codec.unknown(codec.ids("go home\ngo west\n")) == 4  # "home", "west" and the spaces
    assert codec.text(codec.ids("go .\ngo")) == "go .\ngo"


def test_a_prompt_has_a_bos_and_no_eos():
    """Some tokenizers end each text with EOS; without a chat template that text is the prompt."""
    for single in ("<s> $A </s>", "$A </s>", "$A </s> </s>"):
        tokenizer = wrapped(byte_level(prefix=False))
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        processor = tk.processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", bos), ("</s>", eos)]
        )
        tokenizer.backend_tokenizer.post_processor = processor
        codec = Codec(tokenizer, "it", None, len(tokenizer))
        assert codec.prompt_ids("go") == [bos] * single.startswith("<s>") + codec.ids("go")


def test_a_dated_template_is_told_one_date():
    codec = Codec(wrapped(byte_level(prefix=False), chat_template=DATED), "it", None, 400)
    today = codec.prompt_ids("go")
    codec.date = "2024-02-29"
    assert codec.asks_for_date and codec.prompt_ids("go") != today
    assert codec.text(codec.prompt_ids("go")) == "29 Feb 2024, Thursday: go"


def test_a_response_ends_at_the_tokenizer_s_own_eos_too():
    tokenizer = wrapped(byte_level(prefix=False))
    own = tokenizer.eos_token_id
    cases = [(None, [own]), (own, [own]), (5, [5, own]), ([7, 5], [5, 7, own]), (0, [0, own])]
    for end, eos in cases:
        codec = Codec(tokenizer, "it", end, len(tokenizer))
        assert (codec.eos, codec.own_eos) == (eos, own)
        assert codec.text(codec.response_ids("go")) == "go" and codec.response_ids("go")[-1] == own
    tokenizer.eos_token = None
    assert Codec(tokenizer, "it", [7, 5], len(tokenizer)).own_eos == 5
    with pytest.raises(UserError, match="no EOS"):
        Codec(tokenizer, "it", [], len(tokenizer))
