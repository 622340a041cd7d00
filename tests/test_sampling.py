"""Sampling: transformers' processors on random logits, the probabilities of what is drawn, and whose key draws it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.sampling import Sampling, prompt_keys, sample, warp

DRAWS = 20_000


def drawn(logits, sampling: Sampling, seed: int) -> np.ndarray:
    """How often each token comes, of DRAWS."""
    many = jnp.broadcast_to(logits, (DRAWS, logits.shape[-1]))
    tokens = sample(many, jax.random.split(jax.random.key(seed), DRAWS), sampling)
    return np.bincount(np.asarray(tokens), minlength=logits.shape[-1]) / DRAWS


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7), Sampling(1.0, top_k=5), Sampling(1.3, top_k=1), Sampling(1.0, top_k=1000), Sampling(1.0, 0, 0.9),
        Sampling(0.5, 20, 0.6), Sampling(2.0, 3, 1e-6), Sampling(1.0, repetition_penalty=1.7),
        Sampling(0.8, 30, 0.95, 0.6), Sampling(0.0, repetition_penalty=1.3),
    ],
)  # fmt: skip
def test_logits_are_warped_as_by_transformers_and_in_its_order(sampling):
    torch = pytest.importorskip("torch", reason="the reference needs torch")
    from transformers import (  # fmt: skip
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    B, V = 50, 300
    random = np.random.default_rng(1)
    logits, text = random.normal(0, 3, (B, V)).astype(np.float32), random.integers(0, V, (B, 40))
    chain = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature:
        chain.append(TemperatureLogitsWarper(sampling.temperature))
        chain += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
        chain += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    expected = chain(torch.tensor(text), torch.tensor(logits)).numpy()
    seen = np.zeros((B, V), bool)
    seen[np.arange(B)[:, None], text] = True
    found = np.asarray(warp(jnp.asarray(logits), sampling, jnp.asarray(seen)))
    assert (np.isfinite(found) == np.isfinite(expected)).all()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    if sampling.temperature == 0:
        token = sample(jnp.asarray(logits), None, sampling, jnp.asarray(seen))
        assert token.tolist() == expected.argmax(-1).tolist() != logits.argmax(-1).tolist()


def test_samples_have_the_probabilities_of_the_temperature():
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    for temperature in (1.0, 0.5, 2.0):
        expected = np.asarray(jax.nn.softmax(logits[0] / temperature))
        found = drawn(logits, Sampling(temperature), 1)
        assert np.abs(found - expected).max() < 4 * np.sqrt(0.25 / DRAWS)  # four standard deviations


def test_top_p_and_top_k_keep_the_likeliest_tokens_and_their_proportions():
    logits = jnp.log(jnp.asarray([[0.05, 0.5, 0.15, 0.3]]))
    cases = [((0, 0.45), [1]), ((0, 0.6), [1, 3]), ((0, 0.81), [1, 2, 3]), ((0, 1e-6), [1]), ((0, 0.9999), range(4))]
    for (top_k, top_p), kept in [*cases, ((2, 1.0), [1, 3]), ((3, 0.6), [1, 3]), ((2, 0.7), [1, 3])]:
        found = drawn(logits, Sampling(1.0, top_k, top_p), 2)
        expected = np.where(np.isin(range(4), kept), np.exp(np.asarray(logits[0])), 0)
        assert np.abs(found - expected / expected.sum()).max() < 0.015, (top_k, top_p)
        assert set(np.flatnonzero(found)) == set(kept)


def test_a_prompts_key_is_its_own_wherever_it_stands_and_another_each_time_it_is_asked():
    a, b, c = [1, 2, 3], [1, 2], [3, 1, 2]

    def keys(*prompts, seed=0):
        return [tuple(words) for words in jax.random.key_data(prompt_keys(jax.random.key(seed), prompts)).tolist()]

    assert keys(a) == keys(b, a)[1:] == keys(c, b, a)[2:]
    assert len({*keys(a, b, c, a, a), *keys(a, b, seed=1)}) == 7
    assert keys(a, b, a)[2] == keys(a, a)[1]
