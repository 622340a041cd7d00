"""Several data sets in one run: the shares are what the weights say, the same everywhere, and nothing is hidden."""

import collections
import json

import datasets
import numpy as np
import pytest

from jaxft import evaluate, train
from jaxft.config import parse, to_yaml
from jaxft.errors import InputError, run_command
from jaxft.mixture import Source, mix, parse_sources
from jaxft.packing import Batches, make_plan
from jaxft.samples import Samples, lengths_of
from tests.tiny_runs import flags, losses_of, sums, write_base, write_rows


def some_set(lengths, first):
    """A set whose tokens say which sample they belong to: `first`, `first` + 1, …"""
    ids = np.repeat(first + np.arange(len(lengths), dtype=np.int32), lengths)
    return Samples(ids, np.ones(len(ids), bool), np.cumsum([0, *lengths]))


PARTS = [some_set([3, 2, 4, 2, 5, 3], 100), some_set([2, 6], 200)]


def taken(parts, weights, seed=0):
    """How often every sample is taken, by its token."""
    selection, shares = mix(parts, weights, seed)
    assert len(selection) == sum(shares)
    assert selection.lengths.tolist() == lengths_of(selection[:]).tolist() == [len(sample) for sample in selection]
    return collections.Counter(int(sample.input_ids[0]) for sample in selection), shares


def test_without_weights_every_sample_of_every_set_is_taken_once():
    counts, shares = taken(PARTS, None)
    assert shares == [6, 2] and counts == collections.Counter([*range(100, 106), 200, 201])


def test_a_weight_is_the_share_of_the_samples_of_an_epoch():
    counts, shares = taken(PARTS, [0.25, 0.75])
    assert shares == [2, 6]  # of 8, as many as both sets together
    assert counts[200] == counts[201] == 3  # taken three times over
    assert sum(counts[n] for n in range(100, 106)) == 2 and max(counts[n] for n in range(100, 106)) == 1
    counts, shares = taken(PARTS, [0.4, 0.6])
    assert shares == [3, 5] and sorted((counts[200], counts[201])) == [2, 3]
    assert taken([some_set([2] * n, 0) for n in (1, 1, 1)], [1 / 3] * 3)[1] == [1, 1, 1]
    assert taken([some_set([2] * n, 0) for n in (4, 3, 3)], [0.15, 0.15, 0.7])[1] == [2, 1, 7]  # 1.5, 1.5, 7


def test_the_choice_is_one_that_earlier_runs_drew_and_another_with_another_seed():
    """Written down: a resumed run meets other data where a new version of jaxft or numpy draws another choice."""
    selection, _ = mix([some_set([2] * 10, 0), some_set([2] * 2, 50)], [0.5, 0.5], 0)
    assert [int(sample.input_ids[0]) for sample in selection] == [2, 3, 4, 6, 8, 9, 50, 51, 50, 51, 50, 51]
    choices = {tuple(taken([some_set([2] * 30, 0), PARTS[1]], [0.5, 0.5], seed)[0]) for seed in range(5)}
    assert len(choices) == 5
    sums = {mix(PARTS, [0.5, 0.5], seed)[0].checksum() for seed in (0, 0, 1)}
    assert len(sums) == 2
    assert mix(PARTS, None, 0)[0].checksum() != mix(PARTS[::-1], None, 0)[0].checksum()


def test_batches_of_a_mixture_hold_every_sample_as_often_as_it_is_taken():
    selection, _ = mix(PARTS, [0.25, 0.75], 0)
    plan = make_plan(selection.lengths, 12, packing=True, shuffle=True, seed=0)
    batches = Batches(selection, plan, max_length=12, batch_size=2)
    seen = collections.Counter()
    for batch in batches:
        for tokens, segments in zip(batch["tokens"][0], batch["segment_ids"][0], strict=True):
            seen.update(int(tokens[segments == s][0]) for s in range(1, segments.max() + 1))
    assert seen == taken(PARTS, [0.25, 0.75])[0]
    assert batches.tokens == sum(len(sample) for sample in selection)


def test_sources_are_read_from_flags_and_yaml_and_written_back(tmp_path):
    both = (Source("a.jsonl", weight=0.7), Source("some/set", weight=0.3))
    for argv in (
        ["--dataset", "a.jsonl", "some/set", "--dataset_weights", "0.7", "0.3"],
        ["--dataset", "a.jsonl", "some/set", "--dataset_weights", "0.7,0.3"],
        ["--dataset", '[{"path": "a.jsonl", "weight": 0.7}, {"path": "some/set", "weight": 0.3}]'],
    ):
        settings, _ = parse("train", argv)
        assert settings.sources == both
        path = tmp_path / "again.yaml"
        path.write_text(to_yaml(settings))
        assert parse("train", ["--config", str(path)])[0] == settings
    path = tmp_path / "mix.yaml"
    path.write_text(
        "dataset:\n  - {path: a.jsonl, weight: 0.7}\n"
        "  - path: some/set\n    config: main\n    split: test\n    weight: 0.3\n"
    )
    found = parse("train", ["--config", str(path)])[0].sources
    assert found == (Source("a.jsonl", None, None, 0.7), Source("some/set", "main", "test", 0.3))
    path.write_text("dataset: [a.jsonl, b.jsonl]\ndataset_weights: [0.5, 0.5]\n")
    halves = tuple(Source(name, weight=0.5) for name in ("a.jsonl", "b.jsonl"))
    assert parse("train", ["--config", str(path)])[0].sources == halves
    assert parse("train", ["--dataset", "a, b.jsonl"])[0].sources == (Source("a, b.jsonl"),)


@pytest.mark.parametrize(
    ("dataset", "weights", "said"),
    [
        ('["a", "b"]', "0.7,0.7", r"add up to 1.4, not to 1; is \[0.5, 0.5\] meant\?"),
        ('["a", "b"]', "2,1", r"add up to 3, not to 1; is \[0.666667, 0.333333\] meant\?"),
        ('["a", "b"]', "1.5,-0.5", r"weights of the data sets are \[1.5, -0.5\]; each must be above 0"),
        ('["a", "b"]', "1,0", r"weights of the data sets are \[1.0, 0.0\]; each must be above 0"),
        ('["a", "b"]', "nan,1", "each must be above 0"),
        ('["a", "b"]', "1", "dataset_weights has 1 numbers for 2 data sets"),
        ('["a", "b"]', "0.5,half", "dataset_weights is '0.5,half'; expected a number for each data set"),
        ('[{"path": "a", "weight": 0.5}, "b"]', None, "1 of 2 data sets have a weight; give one to all of them"),
        ('[{"path": "a", "weight": 0.5}, "b"]', "0.5,0.5", "contradict each other; choose one"),
        ('[{"path": "a", "weight": "0.5"}]', None, "a: weight is '0.5'; expected a number"),
        ('[{"path": "a", "share": 0.5}]', None, "is neither a name nor an object of path and maybe config, split, wei"),
        ("[3]", None, "3 is neither a name nor an object"),
        ("[]", None, "the list is empty; name at least one data set"),
        ("[a, b]", None, r"\[a, b\] begins as a JSON list and is none"),
    ],
)
def test_sources_and_weights_that_make_no_sense_are_refused(dataset, weights, said):
    with pytest.raises(InputError, match=said):
        parse_sources(dataset, weights)


def test_a_weight_too_small_for_one_sample_is_refused():
    with pytest.raises(InputError, match=r"weight 0\.001 leaves no sample of data set 1"):
        mix(PARTS, [0.001, 0.999], 0)


def test_a_run_mixes_formats_says_the_shares_and_refuses_what_cannot_be(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    base = write_base(tmp_path / "base")
    one, two = write_rows(tmp_path / "one.jsonl", sums(6)), tmp_path / "two.csv"
    two.write_text("text\nabc\ndef\n")
    common = flags(model_name_or_path=base, max_length=64, max_steps=1, lora_r=2, gradient_checkpointing="none")
    out = flags(output_dir=tmp_path / "out")
    mixture = ["--dataset", str(one), str(two), "--dataset_weights", "0.25", "0.75"]
    assert run_command(train.main, [*common, *out, *mixture]) == 0
    said = capsys.readouterr().err
    assert "train: format: question/answer (6 rows), rendered with the chat template\n" in said
    assert "train: format: text (2 rows), as plain text, ended by EOS, all tokens trained\n" in said
    assert f"train: an epoch takes 2 samples of the 6 of {one}, drawn by seed\n" in said
    assert f"train: an epoch takes 6 samples of the 2 of {two}, each 3 times\n" in said
    assert len(losses_of(tmp_path / "out")) == 1
    assert json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[0])["target_tokens"] > 6 * 3
    wrong = write_rows(tmp_path / "b.jsonl", [{"b": 1}])
    for words, argv in (
        ("--dataset_weights has no meaning without --dataset", flags(dataset_weights="1")),
        ("add up to 1.4, not to 1", ["--dataset", str(one), str(two), "--dataset_weights", "0.7,0.7"]),
        ("each must be above 0", ["--dataset", str(one), str(two), "--dataset_weights=-1,2"]),
        ("two.jsonl: there is no such file", ["--dataset", str(one), str(tmp_path / "two.jsonl")]),
        ("no format has the columns seen (b)", ["--dataset", str(one), str(wrong)]),
    ):  # fmt: skip
        assert run_command(train.main, [*common, *flags(output_dir=tmp_path / "other"), *argv]) == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert run_command(evaluate.main, [*flags(model_name_or_path=base), "--dataset", str(one), str(two)]) == 2
    assert "names 2 data sets; evaluate them one by one" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
