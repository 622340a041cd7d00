"""Tokenizers through GGUF and back: the same tokens, the template, the end of a turn; refused where it has no words."""

import json
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from jaxft.convert.gguf import check, pretokenizers
from jaxft.convert.gguf.directory import read_vocabulary
from jaxft.convert.gguf.read import read_header
from jaxft.convert.gguf.tokenizer_in import description, write_tokenizer
from jaxft.convert.gguf.tokenizer_out import NoPreTokenizer, describe
from jaxft.convert.gguf.vocabulary import BYTE, CONTROL, UNKNOWN, UNUSED, USER, from_metadata
from jaxft.errors import InputError
from jaxft.load import EMBEDDED, load_tokenizer
from jaxft.stops import stop_token_ids
from tests.conftest import need_shared
from tests.tiny_runs import CHATML, END_OF_TURN, EOS, make_tokenizer

DIGITS_THEN_WORDS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
CONTRACTIONS, ENDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+{ENDS}"


def cut_by(expression: str, **changes) -> dict:
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False} | changes
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [split, level]}


@pytest.mark.parametrize("name", ["llama-bpe", "llama-spm", "qwen2"])
def test_vocabulary_files_of_llama_cpp_give_their_expected_tokens(name):
    file = need_shared(f"tokenizers/ggml-vocab-{name}.gguf")
    texts = file.with_name(f"{file.name}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = file.with_name(f"{file.name}.out").read_text().split("\n")
    tokenizer = Tokenizer.from_str(json.dumps(description(read_vocabulary(read_header(file)))))
    assert len(texts) == 47
    for text, line in zip(texts, lines, strict=False):
        assert tokenizer.encode(text, add_special_tokens=False).ids == [int(word) for word in line.split()], text
    assert max(tokenizer.get_vocab().values()) < {"llama-bpe": 128256, "llama-spm": 32000, "qwen2": 151936}[name]


def test_llama2s_tokenizer_is_described_as_llama_cpp_has_it(tmp_path):
    theirs = read_vocabulary(read_header(need_shared("tokenizers/ggml-vocab-llama-spm.gguf")))
    write_tokenizer(theirs, tmp_path)
    shutil.copy(need_shared("tokenizers/llama2-tokenizer.model"), tmp_path / "tokenizer.model")
    tokenizer = load_tokenizer(tmp_path)
    found = describe(tokenizer, 32000, tmp_path)
    assert found == theirs  # scores are sentencepiece's own
    assert check.differing(tokenizer, check.tokenizer_of(found)) == []
    # without sentencepiece's file the order of merges gives scores of the same order
    alone = describe(tokenizer, 32000).scores
    order = sorted((n for n in range(32000) if alone[n] < 0), key=lambda n: -theirs.scores[n])
    assert len(order) > 29000
    assert sorted(order, key=lambda n: -alone[n]) == order


def test_a_sentencepiece_model_alone_gives_the_tokens_that_transformers_makes_of_it(tmp_path):
    shutil.copy(need_shared("tokenizers/llama2-tokenizer.model"), tmp_path / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **names}))
    tokenizer = load_tokenizer(tmp_path)
    found = describe(tokenizer, 32000, tmp_path)
    assert (found.add_bos, found.add_eos, found.space_prefix, found.anywhere) == (True, False, True, False)
    assert check.differing(tokenizer, check.tokenizer_of(found)) == []


def test_the_embedded_tokenizer_is_refused_with_the_nearest_named_and_taken_by_name():
    tokenizer = load_tokenizer(EMBEDDED / "base")
    with pytest.raises(NoPreTokenizer, match="Han"):
        describe(tokenizer, 1024, EMBEDDED / "base")
    found = check.vocabulary_of(tokenizer, 1024, EMBEDDED / "base", "gpt-2")
    assert found.pre == "gpt-2" and found.templates == {"default": tokenizer.chat_template}
    assert found.ids == {"eos": 2, "pad": 0, "eot": 0}  # two tokens end an answer, as generation_config.json says
    assert [found.types[n] for n in range(4)] == [CONTROL, CONTROL, CONTROL, 1]
    again = check.tokenizer_of(found)
    assert 0 < len(check.differing(tokenizer, again)) < 5  # numbers of three digits and more


def test_template_special_tokens_and_ends_survive(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    found = describe(tokenizer, 270)
    assert found.pre == "gpt-2"  # without merges all cut alike
    assert found.ids == {"bos": 256, "eos": EOS, "eot": END_OF_TURN}
    assert found.types[256:] == [CONTROL] * 4 + [USER] + [UNUSED] * 9 and found.tokens[-1] == "[PAD269]"
    metadata = {key: value for key, value in found.metadata().items()}
    write_tokenizer(from_metadata(_as_read(metadata)), tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == CHATML and len(again) == 261
    assert (again.bos_token_id, again.eos_token_id) == (256, EOS)
    assert stop_token_ids(again, tmp_path) == [EOS, END_OF_TURN]
    text = "<|im_start|>user\n<tool>é<|im_end|>"
    assert again.encode(text) == tokenizer.encode(text) and 260 in again.encode(text)
    assert again.decode(again.encode(text), skip_special_tokens=True) == "user\n<tool>é"


def _as_read(metadata: dict) -> dict:
    """Metadata as a file gives them: lists of numbers are arrays."""
    import numpy as np

    return {
        key: np.array(value) if isinstance(value, list) and not isinstance(value[0], str) else value
        for key, value in metadata.items()
    }


def test_several_templates_keep_their_names(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": CHATML + "{# tools #}"}
    write_tokenizer(from_metadata(_as_read(describe(tokenizer, 264).metadata())), tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template


@pytest.mark.parametrize("around", [(True, False), (False, True), (True, True)])
def test_what_is_put_around_a_text_is_seen_and_put_again(around):
    tokenizer = make_tokenizer()
    single = [*(["<bos>"] if around[0] else []), "$A", *(["<eos>"] if around[1] else [])]
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, pair=[*single, "$B"], special_tokens=[("<bos>", 256), ("<eos>", EOS)]
    )
    found = describe(tokenizer, 264)
    assert (found.add_bos, found.add_eos) == around
    assert check.differing(tokenizer, check.tokenizer_of(found)) == []


def test_pre_tokenizers_are_recognised_by_structure():
    assert pretokenizers.recognise(cut_by(LLAMA3), True) == "llama-bpe"
    assert pretokenizers.recognise(cut_by(LLAMA3), False) == "smaug-bpe"
    spelt = LLAMA3.replace(CONTRACTIONS, "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])")
    assert pretokenizers.recognise(cut_by(spelt, behavior="Removed", invert=True), True) == "llama-bpe"
    assert pretokenizers.recognise(cut_by(LLAMA3.replace("{1,3}", "")), False) == "qwen2"
    assert pretokenizers.recognise(cut_by(LLAMA3.replace("{1,3}", "")), True) is None
    assert pretokenizers.recognise(DIGITS_THEN_WORDS, False) == "smollm"
    assert pretokenizers.recognise(DIGITS_THEN_WORDS["pretokenizers"][1], False) == "gpt-2"
    assert pretokenizers.recognise({"type": "Whitespace"}, False) is None
    for name, pre in pretokenizers.PRES.items():
        assert pretokenizers.recognise(pretokenizers.build(pre), pre.whole_words) == name
    assert pretokenizers.named("refact") is pretokenizers.PRES["smollm"]


def sentencepiece_like(prefix: bool = True, merges=None, first_only: bool = False) -> PreTrainedTokenizerFast:
    """BPE with byte fallback over a few pieces."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "▁a", "ab", "▁ab", "▁", "a", "b"]
    merges = [["a", "b"], ["▁", "a"], ["▁", "ab"], ["▁a", "b"]] if merges is None else merges
    steps = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    space = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    added = [
        {"id": n, "content": pieces[n], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True} for n in range(3)
    ]  # fmt: skip
    model = {"type": "BPE", "byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>", "merges": merges}
    model["vocab"] = {piece: n for n, piece in enumerate(pieces)}
    text = {"version": "1.0", "added_tokens": added, "model": model, "decoder": {"type": "ByteFallback"}}
    text["normalizer"] = None if first_only else {"type": "Sequence", "normalizers": [*steps, replace]}
    text["pre_tokenizer"] = space if first_only else None
    core = Tokenizer.from_str(json.dumps(text))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("how", [{}, {"prefix": False}, {"first_only": True}])
def test_sentencepiece_without_its_file_gets_scores_by_its_merges(how):
    tokenizer = sentencepiece_like(**how)
    found = describe(tokenizer, 266)
    assert found.model == "llama" and found.types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE] and found.types[-1] == UNUSED
    assert found.scores[260] == 0.0 and found.scores[259] == -1.0 and found.scores[261] == -2.0
    assert found.space_prefix == how.get("prefix", True) and found.anywhere == (not how.get("first_only", False))
    again = check.tokenizer_of(found)
    for text in ("ab a b", "aab é", "a<s>b a", " a", "", "▁ab"):
        assert again.encode(text) == tokenizer.encode(text), text


@pytest.mark.parametrize("scheme", ["always", "never"])
def test_unigram_keeps_its_scores(scheme):
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁a", -1.5), ("a", -2.5), ("b", -3.0), ("ab", -4.0)]
    core = Tokenizer(models.Unigram(pieces, unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Metaspace(prepend_scheme=scheme)
    core.add_special_tokens(["</s>", "<unk>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    found = describe(tokenizer, 9)
    assert (found.model, found.types) == ("t5", [UNKNOWN, CONTROL, 1, 1, 1, 1, 1, UNUSED, UNUSED])
    assert found.scores == [score for _, score in pieces] + [0.0, 0.0] and found.space_prefix == (scheme == "always")
    again = check.tokenizer_of(from_metadata(_as_read(found.metadata())))
    for text in ("ab a b", "aab é", "a</s>b a", "[PAD7]", ""):
        assert again.encode(text) == tokenizer.encode(text), text


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (lambda: sentencepiece_like(merges=[["a", "b"], ["▁", "a"], ["▁", "ab"]]), "fewer pairs"),
        (lambda: sentencepiece_like(merges=[["▁", "ab"], ["a", "b"], ["▁a", "b"], ["▁", "a"]]), "stand apart"),
        (lambda: with_core(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda: with_core(model={"type": "WordPiece", "unk_token": "a", "continuing_subword_prefix": "##",
                                  "max_input_chars_per_word": 9, "vocab": {"a": 0}}), "WordPiece"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_gguf_cannot_say_is_refused(tokenizer, said):
    with pytest.raises(InputError, match=said):
        describe(tokenizer(), 270)


def with_core(**parts) -> PreTrainedTokenizerFast:
    """The tests' tokenizer with some parts of its description changed."""
    made = json.loads(make_tokenizer(None).backend_tokenizer.to_str()) | parts
    if "model" in parts:
        made["added_tokens"] = []
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(made)))


def test_more_tokens_than_rows_are_refused():
    with pytest.raises(InputError, match="token 259, the model's embedding 200 rows"):
        describe(make_tokenizer(), 200)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
        ({"tokenizer.ggml.tokens": []}, "tokens"),
        ({"tokenizer.ggml.merges": ["a zz"]}, "no pair of its tokens"),
        ({"tokenizer.ggml.pre": "unheard-of"}, "unheard-of"),
        ({"tokenizer.ggml.token_type": [1, 2]}, "one number for each"),
        ({"tokenizer.ggml.add_bos_token": 1}, "a switch"),
    ],
)
def test_a_vocabulary_that_contradicts_itself_is_refused(changes, said):
    metadata = _as_read(describe(make_tokenizer(), 264).metadata())
    if "tokenizer.ggml.tokens" in changes:
        metadata |= changes
    else:
        metadata |= {key: _as_read({key: value})[key] for key, value in changes.items()}
    with pytest.raises(InputError, match=said):
        description(from_metadata(metadata))
