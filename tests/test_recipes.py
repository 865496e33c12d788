"""Data sets by name from files of their own layouts, batches of them, and the metrics that judge answers."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import gtflops
from gtflops.families import IGNORED
from gtflops.recipes.batches import batches, in_order
from gtflops.recipes.datasets import END, DataSet, Example, jsonl, load
from gtflops.recipes.metrics import accuracy, exact_match_and_f1, rouge
from small_tokenizer import word_tokenizer

datasets: Any = pytest.importorskip("datasets")


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def scitldr_rows(split: str) -> list[dict[str, Any]]:
    targets = [f"{split} first."] if split == "train" else [f"{split} first.", "second."]
    return [{"source": ["One.", "Two."], "source_labels": [0, 1], "paper_id": "x", "target": targets, "title": "T"}] * 3


# --- the layouts of the published data sets ---------------------------------------------------------------------


def test_scitldr_as_its_repository_has_it(tmp_path: Path) -> None:
    for split, stem in (("train", "train"), ("validation", "dev"), ("test", "test")):
        write_lines(tmp_path / f"{stem}.jsonl", scitldr_rows(split))
    data = load("scitldr", tmp_path)
    assert [len(data.train), len(data.validation), len(data.test)] == [3, 3, 3]
    assert data.validation[1] == Example(
        "One. Two.", " TL;DR:", " validation first.", where=f"{tmp_path / 'dev.jsonl'}:2"
    )
    assert (data.seq_len, data.target_len, data.metric) == (512, 64, "rouge")


def test_scitldr_as_the_hub_converts_it(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        (tmp_path / split).mkdir()
        datasets.Dataset.from_list(scitldr_rows(split)).to_parquet(str(tmp_path / split / "0000.parquet"))
    data = load("scitldr", tmp_path)
    assert [example.target for example in data.train] == [" train first."] * 3
    assert data.test[2].where == f"{tmp_path / 'test' / '0000.parquet'} row 3"


def test_dialogsum_is_csv(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.csv").write_text(
            'id,dialogue,summary,topic\r\n0,"#A#: one,\r\n#B#: ""two""",None,x\r\n1,three,NA,y\r\n', newline=""
        )
    data = load("dialogsum", tmp_path)
    assert [len(data.train), len(data.validation), len(data.test)] == [2, 2, 2]
    assert data.train[0].source == '#A#: one,\r\n#B#: "two"'
    assert [example.target for example in data.train] == [" None", " NA"]  # words, not missing values
    assert (data.seq_len, data.target_len, data.metric) == (512, 128, "rouge")


def test_webquestions_in_shards_and_saved(tmp_path: Path) -> None:
    rows = [{"url": "u", "question": f"who {index}?", "answers": ["the cat", "one"]} for index in range(4)]
    shards = tmp_path / "shards" / "data"
    shards.mkdir(parents=True)
    for index in range(2):
        part = datasets.Dataset.from_list(rows[2 * index : 2 * index + 2])
        part.to_parquet(str(shards / f"train-0000{index}-of-00002.parquet"))
    datasets.Dataset.from_list(rows[:1]).to_parquet(str(shards / "test-00000-of-00001.parquet"))
    saved = tmp_path / "saved"
    datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
    ).save_to_disk(str(saved))
    from_shards, from_saved = load("webquestions", tmp_path / "shards"), load("webquestions", saved)

    def texts(data: DataSet) -> list[tuple[str, str, str, tuple[str, ...]]]:
        return [(one.source, one.cue, one.target, one.answers) for one in (*data.train, *data.validation)]

    expected = [(f"question:who {i}?", f"{END}answer:", "the cat", ("the cat", "one")) for i in (0, 1, 2, 3, 0)]
    assert texts(from_shards) == texts(from_saved) == expected
    assert (from_saved.seq_len, from_saved.metric) == (160, "answers")


def test_piqa_with_its_labels_beside(tmp_path: Path) -> None:
    rows = [{"goal": "g", "sol1": "a", "sol2": "b"}] * 3
    for stem, labels in (("train", "0\n1\n1\n"), ("dev", "1\n0\n1\n")):
        write_lines(tmp_path / f"{stem}.jsonl", rows)
        (tmp_path / f"{stem}-labels.lst").write_text(labels)
    data = load("piqa", tmp_path)
    assert [example.target for example in data.train] == ["0", "1", "1"]
    assert data.validation[0].source == f"goal:g{END}sol1:a{END}sol2:b"
    assert data.validation[0].cue == f"{END}label:"
    assert data.validation[0].choices == ("0", "1")
    assert (data.seq_len, data.metric, data.test) == (400, "choices", ())
    (tmp_path / "dev-labels.lst").write_text("1\n")
    with pytest.raises(gtflops.InputError, match=r"dev-labels.lst has 1 labels for the 3 rows of .*dev.jsonl"):
        load("piqa", tmp_path)
    write_lines(tmp_path / "dev.jsonl", [{**rows[0], "label": -1}])
    (tmp_path / "dev-labels.lst").unlink()
    with pytest.raises(gtflops.InputError, match=r"dev.jsonl:1 has -1 in the column 'label', expected 0 or 1"):
        load("piqa", tmp_path)


def test_the_hub_is_asked_for_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def load_dataset(**arguments: Any) -> Any:
        asked.append(arguments)
        return scitldr_rows(arguments["split"])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load("scitldr").train[0].where == "allenai/scitldr train row 1"
    assert asked == [
        {"path": "allenai/scitldr", "data_dir": "Abstract", "revision": "refs/convert/parquet", "split": split}
        for split in ("train", "validation", "test")
    ]


# --- what is no data set ----------------------------------------------------------------------------------------


def test_a_hub_out_of_reach_says_what_a_local_copy_looks_like() -> None:
    with pytest.raises(gtflops.InputError, match=r"cannot load ybisk/piqa from the Hugging Face hub") as raised:
        load("piqa")
    for part in ("train.jsonl with train-labels.lst", "columns goal, sol1, sol2, label"):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds nothing, but no file of the split train; expected for dialogsum train.csv, validation.csv and"),
        ({"readme.md": "x"}, "holds readme.md, but no file of the split train"),
        (
            {"train.csv": "id,dialogue\n1,a\n"},
            r"csv row 1 has the columns \['dialogue', 'id'\], but not 'summary'",
        ),
        (
            {"train.csv": "dialogue,summary\na,b\nc,\n"},
            "train.csv row 2 has '' in the column 'summary', expected",
        ),
        ({"train.csv": "dialogue,summary\na,b\nc\n"}, "train.csv row 2 has None in the column 'summary'"),
        ({"train.csv": "dialogue,summary\n"}, "train.csv holds no rows, expected some with dialogue, summary"),
        ({"train.csv": 'dialogue,summary\n"a,b\n'}, "train.csv row 1 is no CSV: unexpected end"),
        ({"train.jsonl": '{"dialogue": "a", "summary": "b"}\n{"dialogue"'}, "train.jsonl:2 is no JSON"),
        ({"train.jsonl": '{"dialogue": " ", "summary": "b"}'}, "train.jsonl:1 has ' ' in the column 'dialogue'"),
        ({"train.parquet": "PAR"}, "cannot read .*train.parquet"),
        ({"train.csv": "dialogue,summary\na,b\n"}, "no file of the split validation"),
        ({"dataset_dict.json": "{"}, "cannot read"),
    ],
)
def test_folders_that_are_no_data_set(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(gtflops.InputError, match=message):
        load("dialogsum", tmp_path)


def test_names_and_options_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(gtflops.InputError, match=r"no data set 'scitlr' \(nearest: 'scitldr'\); expected one of"):
        load("scitlr")
    with pytest.raises(gtflops.InputError, match="is no folder; expected one for piqa"):
        load("piqa", tmp_path / "absent")
    with pytest.raises(gtflops.InputError, match="columns is for the data set 'jsonl'"):
        load("aclsum", columns={"prompt": "a"})
    with pytest.raises(gtflops.InputError, match="a path was given"):
        load("aclsum", tmp_path)
    with pytest.raises(gtflops.InputError, match="'jsonl' needs a path"):
        load("jsonl")


@pytest.mark.parametrize("module", ["datasets", "rouge_score.rouge_scorer"])
def test_a_package_that_is_not_installed(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(gtflops.InputError, match=r"is not installed; pip install 'gtflops\[recipes\]'"):
        _ = load("piqa") if module == "datasets" else rouge(["a"], ["a"])


# --- files of one's own -----------------------------------------------------------------------------------------


def test_jsonl_with_named_columns(tmp_path: Path) -> None:
    path, held_out = tmp_path / "qa.jsonl", tmp_path / "held_out.jsonl"
    write_lines(path, [{"question": f"who {index}", "answer": ["one", "two"], "id": index} for index in range(21)])
    write_lines(held_out, [{"question": ["a", "b"], "answer": "c"}])
    columns = {"prompt": "question", "target": "answer"}
    data = load("jsonl", path, columns=columns)
    assert [example.source for example in data.validation] == ["who 0", "who 10", "who 20"]
    assert len(data.train) == 18
    assert data.train[0] == Example("who 1", "", "one", ("one", "two"), where=f"{path}:2")
    data = load("jsonl", path, columns=columns, validation=held_out)
    assert len(data.train) == 21
    assert [(example.source, example.target) for example in data.validation] == [("a b", "c")]
    with pytest.raises(gtflops.InputError, match=r"qa.jsonl:1 has the columns \['answer', 'id', 'question'\], but not"):
        load("jsonl", path)
    with pytest.raises(gtflops.InputError, match=r"columns names \['source'\], expected the columns for"):
        load("jsonl", path, columns={"source": "question"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no examples, expected a JSON object with 'prompt' and 'target'"),
        ('{"prompt": "a"}', r"has the columns \['prompt'\], but not 'target'"),
        ('{"prompt": "a", "target": ""}', "pairs.jsonl:1 has '' in the column 'target', expected a text"),
        ('{"prompt": "a", "target": []}', "expected a text, or a list of texts, that is not empty"),
        ('{"prompt": 3, "target": "b"}', "has 3 in the column 'prompt'"),
        ('{"prompt": "a", "target": "b"}\n\n{"prompt"', "pairs.jsonl:3 is no JSON"),
        ("[1]", "has a list"),
    ],
)
def test_examples_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(gtflops.InputError, match=message):
        jsonl(path)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(gtflops.InputError, match="cannot read"):
        jsonl(tmp_path / "pairs.jsonl")


# --- batches ----------------------------------------------------------------------------------------------------


def test_batches_have_their_loss_on_the_target_only() -> None:
    tokenizer = word_tokenizer()
    examples = [Example("what it costs", "", "a model"), Example("to be trained " * 9, " it", "a model learns")]
    batch = next(batches(examples, tokenizer, batch_size=2, seq_len=12))
    assert tokenizer.batch_decode(batch["input_ids"]) == [
        "what it costs a model <eos> <pad> <pad> <pad> <pad> <pad> <pad>",
        "to be trained to be trained to it a model learns <eos>",
    ]
    supervised = [tokenizer.decode(row[row != IGNORED]) for row in batch["labels"]]
    assert supervised == ["a model <eos>", "a model learns <eos>"]
    assert batch["attention_mask"].sum(1).tolist() == [6, 12]
    with pytest.raises(gtflops.InputError, match="2 examples do not fill a batch of 3"):
        next(batches(examples, tokenizer, batch_size=3, seq_len=12))
    epochs = batches(examples * 8, tokenizer, batch_size=2, seq_len=12, seed=1)
    again = batches(examples * 8, tokenizer, batch_size=2, seq_len=12, seed=1)
    assert all(torch.equal(next(epochs)["labels"], next(again)["labels"]) for _ in range(20))


def test_a_target_without_room_is_found_before_the_first_batch() -> None:
    """The error names the row, and the length that it names is the least one that works."""
    examples = [Example("what", "", "a"), Example("what it", " it", "a model learns", where="x.jsonl:2")]
    message = "x.jsonl:2: a target of 3 tokens leaves no room for its prompt in 5; expected seq_len of at least 6"
    with pytest.raises(gtflops.InputError, match=message):
        batches(examples, word_tokenizer(), batch_size=1, seq_len=5)
    last = in_order(examples, word_tokenizer(), batch_size=1, seq_len=6)[1]
    assert word_tokenizer().decode(last["input_ids"][0]) == "what it a model learns <eos>"


def test_ends_in_a_prompt_and_the_tokenizers_own_beginning() -> None:
    tokenizer = word_tokenizer(begins=True)
    example = Example("question : who", f"{END}answer :", "the cat")
    (batch,) = in_order([example] * 2, tokenizer, batch_size=4, seq_len=12)
    assert tokenizer.decode(batch["input_ids"][1]) == ("<bos> question : who <eos> answer : the cat <eos> <pad> <pad>")
    (cut,) = in_order([example], tokenizer, batch_size=1, seq_len=8)
    assert tokenizer.decode(cut["input_ids"][0]) == "<bos> question <eos> answer : the cat <eos>"


def test_an_encoder_decoder_has_the_prompt_and_the_target_apart() -> None:
    tokenizer = word_tokenizer()
    example = Example("what it costs and brings", " it", "a model", where="x.jsonl:1")
    (batch,) = in_order([example], tokenizer, batch_size=1, seq_len=6, target_len=4)
    assert tokenizer.decode(batch["input_ids"][0]) == "what it costs and it <eos>"
    assert batch["labels"].tolist() == [[*tokenizer("a model")["input_ids"], tokenizer.eos_token_id, IGNORED]]
    message = "x.jsonl:1: a target of 2 tokens does not fit into 2 labels; expected target_len of at least 3"
    with pytest.raises(gtflops.InputError, match=message):
        in_order([example], tokenizer, batch_size=1, seq_len=6, target_len=2)
    with pytest.raises(gtflops.InputError, match="seq_len is 2, expected at least 3"):
        in_order([example], tokenizer, batch_size=1, seq_len=2, target_len=3)


# --- metrics ----------------------------------------------------------------------------------------------------


def test_rouge_by_hand() -> None:
    # Words: 4 of 5 and 4 of 6, F = 8/11. Pairs: "the cat" and "the mat" of 4 and 5, F = 4/9. The longest common
    # subsequence is "the cat the mat", 4 words: F = 8/11. The second pair has nothing in common.
    scores = rouge(["the cat near the mat", "no"], ["The cat is on the mat.", "yes"])
    assert scores == pytest.approx({"rouge1": 50 * 8 / 11, "rouge2": 50 * 4 / 9, "rougeL": 50 * 8 / 11})
    # In another order the words agree, and the subsequence is one word shorter: 2 of 3.
    assert rouge(["b a c"], ["a b c"]) == pytest.approx({"rouge1": 100, "rouge2": 0, "rougeL": 200 / 3})


def test_exact_match_and_f1_by_hand() -> None:
    # "new york city" against "new york": 2 shared, F1 = 2 * 2 / 5; the better of two answers counts.
    answers = [["London", "New York"], ["an apple"], ["x"]]
    scores = exact_match_and_f1(["New York City!", "Apple.", ""], answers)
    assert scores == pytest.approx({"exact_match": 100 / 3, "f1": 100 * (0.8 + 1 + 0) / 3})
    # A word that both have once and one of them twice is shared once: F1 = 2 * 1 / 3.
    assert exact_match_and_f1(["one one"], [["one"]])["f1"] == pytest.approx(200 / 3)
    assert exact_match_and_f1(["the"], [["a"]]) == {"exact_match": 100.0, "f1": 100.0}


def test_metrics_refuse_what_cannot_be_paired() -> None:
    for call in (lambda: rouge(["a"], []), lambda: accuracy([], []), lambda: exact_match_and_f1(["a"], [["a"], ["b"]])):
        with pytest.raises(gtflops.InputError, match="expected as many, at least one"):
            call()
