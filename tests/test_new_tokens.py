"""Tokens added to a model, and embedding and head trained beside LoRA: the commands, PEFT, transformers, resuming."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from jaxft import evaluate, generate, load_adapter, load_model, load_tokenizer, train
from jaxft.config import parse
from jaxft.convert import __main__ as convert
from jaxft.errors import InputError, run_command
from jaxft.prepare import prepare
from jaxft.vocabulary import read_tokens
from tests.tiny_runs import flags, lines_of, losses_of, same_tensors, sums, write_base, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT's
KNOWN = {"untied": 260, "tied": 261}  # tokens at first; Qwen 2's tokenizer brings one of its own for padding
NEW = ["<sum>", "<done>"]
EMBEDDING = "base_model.model.model.embed_tokens.weight"
RUN = flags(
    max_length=64, per_device_train_batch_size=4, learning_rate=0.01, embedding_learning_rate=0.02, lora_r=2,
    lora_target_modules="q_proj", max_steps=4, save_steps=2, lr_scheduler_type="constant", weight_decay=0.1,
)  # fmt: skip


def rows(count, first=0):
    return [{"question": f"<sum>{row['question']}", "answer": f"{row['answer']}<done>"} for row in sums(count, first)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Bases whose embedding has 264 rows for 260 tokens, one with a head of its own and one without; rows."""
    directory = tmp_path_factory.mktemp("tokens")
    write_base(directory / "untied", "qwen3")
    write_base(directory / "tied", "qwen2_tied")
    write_rows(directory / "train.jsonl", rows(24))
    write_rows(directory / "held.jsonl", rows(6, 24))
    return directory


@pytest.fixture(scope="module")
def start(place):
    def run(name, base, *argv, **settings):
        named = flags(model_name_or_path=place / base, dataset=place / "train.jsonl", output_dir=place / name)
        assert train.main([*RUN, *named, *argv, *flags(**settings)]) == 0
        return place / name

    return run


@pytest.fixture(scope="module")
def tuned(start, place):
    """base -> adapter with two new tokens."""
    return {
        base: start(f"tuned-{base}", base, add_tokens=",".join(NEW), eval_dataset=place / "held.jsonl")
        for base in ("untied", "tied")
    }


def test_rows_of_new_tokens_start_as_the_mean_of_the_others(place, capsys):
    settings, _ = parse("train", ["--add_tokens=<sum>,<done>,<eos>", "--max_length=64"])
    prepared = prepare(settings, str(place / "untied"))
    said = capsys.readouterr().err
    assert "tokens: 2 added; 1 of 3 were there already" in said
    assert "embedding: 262 rows, 264 before; the tokenizer had 260 tokens" in said
    assert prepared.new_tokens == tuple(NEW) and prepared.model.config.vocab_size == 262
    base = load_file(place / "untied" / "model.safetensors")
    for module, name in {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}.items():
        before, after = base[name], np.asarray(prepared.trainable[module]["weight"])
        assert after.shape == (262, before.shape[1]) and after.dtype == np.float32
        np.testing.assert_array_equal(after[:260], before[:260])
        np.testing.assert_allclose(after[260:], np.tile(before[:260].mean(0), (2, 1)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("base", ["untied", "tied"])
def test_adapter_with_new_tokens_is_one_for_peft_transformers_and_every_command(base, tuned, place, tmp_path, capsys):
    """The way that the model card says: resize the base to the tokenizer, put the adapter on."""
    pytest.importorskip("torch", reason="the reference needs torch")
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = tuned[base]
    losses = losses_of(out)
    assert losses[-1] < losses[0]
    tokenizer = AutoTokenizer.from_pretrained(out)
    known = KNOWN[base]
    assert len(tokenizer) == known + 2 and tokenizer.encode("<sum>1<done>") == [known, 16, known + 1]
    card = (out / "README.md").read_text()
    assert "base.resize_token_embeddings(len(tokenizer))" in card
    model = AutoModelForCausalLM.from_pretrained(place / base, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    tuned_model = PeftModel.from_pretrained(model, str(out)).eval()
    prompt = "<sum>3 + 4?"
    tokens = torch.tensor([tokenizer.encode(prompt)])
    with torch.no_grad():
        theirs = tuned_model(tokens).logits[0].numpy()
    ours, trainable, frozen, config = load_adapter(out, *load_model(place / base))
    assert config.modules_to_save == (("embed_tokens",) if base == "tied" else ("embed_tokens", "lm_head"))

    def logits(model, *trees):
        decoder, (ids,) = model.bind(*trees), tokens.numpy().astype(np.int32)[None]
        hidden = decoder(ids, np.ones_like(ids), np.arange(ids.shape[1], dtype=np.int32)[None])
        return np.asarray(decoder.logits(hidden))[0]

    assert np.abs(logits(ours, trainable, frozen) - theirs).max() <= 1e-4
    if base == "untied":
        return  # what follows is the same
    named = flags(model_name_or_path=place / base, adapter=out)
    capsys.readouterr()
    assert evaluate.main([*named, *flags(max_length=64, dataset=place / "held.jsonl")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(lines_of(out)[-1]["eval_loss"], rel=1e-5)
    assert generate.main([*named, f"--prompt={prompt}", "--max_new_tokens=6"]) == 0
    said = capsys.readouterr().out
    # merged: transformers loads it as it is
    merged = tmp_path / "merged"
    assert run_command(convert.main, ["merge", str(place / base), str(out), str(merged)]) == 0
    assert json.loads(capsys.readouterr().out)["largest_logit_difference"] <= 1e-4
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    assert whole.config.vocab_size == known + 2 and whole.config.tie_word_embeddings == (base == "tied")
    assert AutoTokenizer.from_pretrained(merged).get_vocab() == tokenizer.get_vocab()
    with torch.no_grad():
        assert np.abs(whole(tokens).logits[0].numpy() - theirs).max() <= 1e-4
        new = whole.generate(tokens, max_new_tokens=6, do_sample=False, eos_token_id=[257, 259], pad_token_id=257)
    assert tokenizer.decode(new[0, tokens.shape[1] :], skip_special_tokens=True) == said
    assert generate.main([*flags(model_name_or_path=merged), f"--prompt={prompt}", "--max_new_tokens=6"]) == 0
    assert capsys.readouterr().out == said


def test_adapter_with_new_tokens_is_continued_with_them(tuned, start):
    out = start("continued", "tied", adapter=tuned["tied"], max_steps=2)
    assert len(load_tokenizer(out)) == KNOWN["tied"] + 2
    assert load_file(out / "adapter_model.safetensors")[EMBEDDING].shape[0] == KNOWN["tied"] + 2
    assert losses_of(out)[0] < losses_of(tuned["tied"])[0]


def test_run_with_new_tokens_resumes_bit_for_bit(tuned, start, place):
    first = start("halves", "untied", add_tokens=",".join(NEW), max_steps=2, eval_dataset=place / "held.jsonl")
    (first / "config.yaml").unlink()
    start("halves", "untied", "--resume_from_checkpoint=auto", add_tokens=",".join(NEW), max_steps=4,
          eval_dataset=place / "held.jsonl")  # fmt: skip
    assert losses_of(first) == losses_of(tuned["untied"])
    assert same_tensors(first / "adapter_model.safetensors", tuned["untied"] / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"embedding_learning_rate was 0\.02 and is 0\.03"):
        start("halves", "untied", "--resume_from_checkpoint=auto", add_tokens=",".join(NEW), max_steps=5,
              embedding_learning_rate=0.03)  # fmt: skip


def test_full_fine_tuning_with_new_tokens_writes_a_model_that_has_them(place, start):
    pytest.importorskip("torch", reason="the reference needs torch")
    from transformers import AutoModelForCausalLM

    (place / "tokens.txt").write_text("<sum>\n<done>\n\n<sum>\n")
    named = flags(model_name_or_path=place / "tied", dataset=place / "train.jsonl", output_dir=place / "full")
    given = flags(max_length=64, per_device_train_batch_size=4, max_steps=1, add_tokens=place / "tokens.txt")
    assert train.main([*named, *given, "--full_finetuning", "--embedding_learning_rate=1e-3"]) == 0
    out = place / "full"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.get_input_embeddings().weight.shape[0] == KNOWN["tied"] + 2 == len(AutoTokenizer.from_pretrained(out))
    assert "AutoModelForCausalLM.from_pretrained" in (out / "README.md").read_text()


def test_adapter_that_peft_made_after_resizing_its_base_loads_with_its_tokenizer(place, tmp_path, capsys):
    """PEFT writes a resized embedding beside the adapter even where nothing trains it."""
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    import peft
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(place / "untied")
    tokenizer.add_tokens(NEW)
    for modules in (None, ["embed_tokens", "lm_head"]):
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(place / "untied", dtype=torch.float32)
        base.resize_token_embeddings(len(tokenizer))
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=modules))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.2)
        out = tmp_path / f"peft-{modules is None}"
        model.save_pretrained(out)
        with pytest.raises(
            InputError, match="holds 262 tokens, the model 264, and the tokenizer that knows them is not"
        ):
            generate.main(flags(model_name_or_path=place / "untied", adapter=out, prompt="x"))
        tokenizer.save_pretrained(out)
        ours, trainable, frozen, _ = load_adapter(out, *load_model(place / "untied"))
        assert ("embed_tokens" in trainable) == (modules is not None)
        tokens = np.arange(200, 262, dtype=np.int32)[None]
        decoder = ours.bind(trainable, frozen)
        logits = decoder.logits(decoder(tokens, np.ones_like(tokens), np.arange(62, dtype=np.int32)[None]))
        with torch.no_grad():
            theirs = model.eval()(torch.from_numpy(tokens).long()).logits.numpy()
        assert np.abs(np.asarray(logits) - theirs).max() <= 1e-4
        merged = tmp_path / f"merged-{modules is None}"
        argv = ["merge", "--check=false", str(place / "untied"), str(out), str(merged)]
        assert run_command(convert.main, argv) == 0
        assert len(load_tokenizer(merged)) == 262
        weights, embedding = load_file(merged / "model.safetensors"), model.get_input_embeddings().weight
        np.testing.assert_array_equal(weights["model.embed_tokens.weight"], embedding.detach().numpy())


# what is refused


def test_tokens_are_read_from_words_and_from_files(tmp_path):
    assert read_tokens("<a>,b c,<a>") == ["<a>", "b c"]
    (tmp_path / "list").write_text("<a>,<b>\n\n c\n")
    assert read_tokens(str(tmp_path / "list")) == ["<a>,<b>", " c"]
    for words in ([], [""], [","]):
        with pytest.raises(InputError):
            read_tokens(",".join(words))
    with pytest.raises(InputError, match=r"--add_tokens \./none cannot be read"):
        read_tokens("./none")
    assert parse("train", ["--add_tokens", "<a>", "b c,<d>"])[0].add_tokens == "<a>,b c,<d>"


REFUSED = {
    "a pattern that matches nothing": (["--lora_target_modules=.*banana"], "'.*banana' matches the whole name of no"),
    "two words with a pattern": (["--lora_target_modules", ".*q_proj", "v_proj"], "a regular expression stands alone"),
    "a pattern and layers": (["--lora_target_modules=.*q_proj", "--layers_to_transform=0"], "contradict each other"),
    "a broken pattern": (["--lora_target_modules=(q_proj"], "is no regular expression"),
    "a layer that is not there": (["--layers_to_transform=0,2"], "no layer 2; this model has layers 0 to 1"),
    "a layer that is no number": (["--layers_to_transform=first"], "expected numbers such as 0,1,5"),
    "a rank for nothing": (['--rank_pattern={"k_proj": 2}'], "rank_pattern: 'k_proj' matches no module with a branch"),
    "an alpha for nothing": (['--alpha_pattern={"3.q_proj": 2}'], "alpha_pattern: '3.q_proj' matches no module"),
    "a rank of nothing": (['--rank_pattern={"q_proj": 0}'], "'q_proj' is 0; it must be a whole number above 0"),
    "a rank that is a word": (['--rank_pattern={"q_proj": "many"}'], "'q_proj' is 'many'; it must be a whole number"),
    "a pattern that is no object": (["--rank_pattern=8"], "--rank_pattern is '8'; expected JSON"),
    "an unknown module to save": (["--modules_to_save=norm"], "'norm' is not supported; expected embed_tokens or"),
    "a rate of nothing": (["--embedding_learning_rate=1e-3"], "--embedding_learning_rate needs a trained embedding"),
    "tying of nothing": (["--ensure_weight_tying"], "--ensure_weight_tying needs --modules_to_save or --add_tokens"),
    "tying of an untied model": (
        ["--ensure_weight_tying", "--modules_to_save=lm_head"], "the head of this model is not its embedding"
    ),
    "no token": (["--add_tokens=,"], "names no token"),
    **{
        f"{flag} with full fine-tuning": (["--full_finetuning", flag], f"{flag.split('=')[0]} has no meaning with")
        for flag in ("--layers_to_transform=0", '--rank_pattern={"q_proj": 1}', "--modules_to_save=lm_head",
                     "--ensure_weight_tying")
    },
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_say_nothing_or_too_much_are_refused(case, place, capsys):
    given, message = REFUSED[case]
    run = ["--max_length=64", "--max_steps=1", "--lora_target_modules=q_proj"]
    if any("lora_target" in word for word in given) or "--full_finetuning" in given:
        run = run[:2]
    named = flags(model_name_or_path=place / "untied", dataset=place / "train.jsonl", output_dir=place / "never")
    assert run_command(train.main, [*run, *named, *given]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and message in error
    assert not (place / "never").exists()


def test_flags_that_contradict_the_adapter_are_refused(tuned, start, place):
    for given, message in {
        "--lora_target_modules=k_proj": "--lora_target_modules k_proj contradicts --adapter .*, whose target_modules",
        "--layers_to_transform=1": "--layers_to_transform 1 contradicts --adapter .*, whose layers_to_transform is",
        '--rank_pattern={"q_proj": 3}': "--rank_pattern .* contradicts --adapter .*, whose rank_pattern is {}",
        "--modules_to_save=lm_head": "--modules_to_save lm_head contradicts --adapter .*, whose modules_to_save is",
        "--add_tokens=<x>": "--add_tokens and --adapter contradict each other; merge the adapter first",
    }.items():
        with pytest.raises(InputError, match=message):
            start("never", "untied", given, adapter=tuned["untied"])
    named = flags(model_name_or_path=place / "untied", dataset=place / "train.jsonl", adapter=tuned["untied"])
    same = [r"--lora_target_modules=.*\.q_proj", "--modules_to_save=lm_head,embed_tokens"]  # said in another way
    assert train.main([*RUN[:2], *named, *same, *flags(output_dir=place / "again", max_steps=1)]) == 0
