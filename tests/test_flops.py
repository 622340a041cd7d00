"""Model FLOPs: counted as a paper counts them, padding not at all, and logged as a share of the card's peak."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import loop, train
from jaxft.cards import peak_flops
from jaxft.flops import model_flops
from jaxft.packing import lay_rows
from jaxft.samples import Sample
from tests.tiny_models import tiny_model
from tests.tiny_runs import flags, lines_of, sums, write_base, write_rows


def document(length: int) -> Sample:
    return Sample(np.arange(length, dtype=np.int32), np.minimum(np.arange(length), 1).astype(np.float32))


def test_flops_are_two_a_weight_and_token_and_pass_and_attentions_pairs_without_padding():
    model, _ = tiny_model("qwen3")
    c = model.config
    per_layer = (
        c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads) + 3 * c.hidden_size * c.intermediate_size
    )
    weights = c.num_layers * per_layer + c.vocab_size * c.hidden_size
    pairs = sum(range(1, 6)) + sum(range(1, 4))  # documents of 5 and 3 tokens, each query sees itself and before
    attention = 3 * 4 * c.num_heads * c.head_dim * pairs * c.num_layers
    for rows in (8, 32):  # padded to either
        batch = lay_rows([[document(5), document(3)]], (1, 2, rows))
        assert model_flops(model, batch, True) == 2 * 3 * 8 * weights + attention
        assert model_flops(model, batch, False) == 2 * 2 * 8 * weights + attention


def test_a_window_hides_pairs():
    model, _ = tiny_model("qwen3_window_bias")
    window = max(filter(None, model.config.layer_window))
    one, two = (model_flops(model, lay_rows([[document(length)]], (1, 1, 4 * window)), True)
                for length in (2 * window, 3 * window))  # fmt: skip
    three = model_flops(model, lay_rows([[document(4 * window)]], (1, 1, 4 * window)), True)
    if all(model.config.layer_window):
        assert three - two == two - one  # beyond the window every token sees equally many
    else:
        assert three - two > two - one


def test_the_peak_is_that_of_16_bits_on_a_known_card():
    class Card:
        device_kind = "NVIDIA H200"

    assert peak_flops(Card(), jnp.bfloat16) == 989e12 and peak_flops(Card(), jnp.float32) is None
    assert peak_flops(jax.devices()[0], jnp.bfloat16) is None  # a CPU


def test_mfu_is_the_steps_flops_a_second_as_a_share_of_the_peak(tmp_path, monkeypatch):
    write_base(tmp_path / "base")
    write_rows(tmp_path / "train.jsonl", sums(20))
    counted = []

    def count(model, batch, full_finetuning):
        counted.append(model_flops(model, batch, full_finetuning))
        return counted[-1]

    monkeypatch.setattr(loop, "peak_flops", lambda device, dtype: 1e9)
    monkeypatch.setattr(loop, "model_flops", count)
    argv = flags(model_name_or_path=tmp_path / "base", dataset=tmp_path / "train.jsonl", output_dir=tmp_path / "out")
    argv += flags(max_length=64, per_device_train_batch_size=4, max_steps=4, logging_steps=2, lora_r=4)
    assert train.main([*argv, "--gradient_checkpointing=none"]) == 0
    lines = lines_of(tmp_path / "out")
    expected = [counted[0] + counted[1], counted[2] + counted[3]]
    assert [line["mfu"] * 1e9 * line["step_seconds"] * 2 for line in lines] == pytest.approx(expected)
    assert "Model FLOPs utilisation" in (tmp_path / "out" / "report.html").read_text()
