"""`scripts/make_tiny_model.py`: a small model around a real tokenizer trains, and all of GSM8K is counted right."""

import math
from pathlib import Path

import pytest

from jaxft import train
from jaxft.errors import InputError
from tests.conftest import need_shared
from tests.tiny_runs import flags, losses_of, make_tokenizer, sums, write_rows

ROOT = Path(__file__).parent.parent


@pytest.fixture
def make_tiny_model(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import make_tiny_model

    return make_tiny_model.main


def test_the_script_makes_a_model_around_any_tokenizer(make_tiny_model, tmp_path, capsys):
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    argv = ["gemma3_text", str(tmp_path / "tokenizer"), str(tmp_path / "tiny")]
    assert make_tiny_model([*argv, "--layers=1", "--hidden_size=32"]) == 0
    assert "260 tokens in 320 rows, EOS <|im_end|>, with a chat template" in capsys.readouterr().out
    with pytest.raises(InputError, match="exists already"):
        make_tiny_model(argv)
    data = write_rows(tmp_path / "train.jsonl", sums(30))
    settings = flags(model_name_or_path=tmp_path / "tiny", dataset=data, output_dir=tmp_path / "out", max_length=64)
    assert train.main([*settings, *flags(max_steps=2, gradient_checkpointing="none")]) == 0
    assert losses_of(tmp_path / "out")[0] == pytest.approx(math.log(320), abs=0.3)


@pytest.mark.long
def test_gsm8k_trains_with_the_real_qwen_vocabulary(make_tiny_model, tmp_path, capsys):
    pytest.importorskip("gguf", reason="transformers reads the vocabulary file through the gguf package")
    vocabulary, data = need_shared("tokenizers/ggml-vocab-qwen2.gguf"), need_shared("data/gsm8k/train.jsonl")
    base = tmp_path / "tiny"
    assert make_tiny_model(["qwen2", str(vocabulary), str(base), "--layers=1", "--hidden_size=32"]) == 0
    settings = flags(model_name_or_path=base, dataset=data, max_length=512, output_dir=tmp_path / "out", max_steps=6)
    settings += flags(per_device_train_batch_size=1, learning_rate=0.02)
    assert train.main([*settings, "--full_finetuning"]) == 0
    # the counts are those of rendering and tokenising every row with transformers alone
    assert "samples: 7473, 1505271 tokens, 917545 of them targets" in capsys.readouterr().err
    losses = losses_of(tmp_path / "out")
    assert losses[0] == pytest.approx(math.log(151936), abs=0.1) and losses[-1] < losses[0] - 0.5
