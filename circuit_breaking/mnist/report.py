"""What the MNIST scripts print: a description of the data, and the table of results."""

from circuit_breaking.mnist.digits import Images, Split
from circuit_breaking.runs.mnist_results import MnistReport
from circuit_breaking.runs.plain_table import print_table

COLUMNS = (
    "edges cut",
    "bad examples",
    "test target",
    "train target",
    "test other",
    "train other",
    "test mates",
    "test target as reference",
)


def describe(images: Images, split: Split) -> str:
    """The data and the task in a few lines."""
    target, counts = split.target_class, {name: len(rows) for name, (_, rows) in split.sets.items()}
    return "\n".join(
        (
            f"data: {images.source}; {len(images.train_x):,} training and {len(images.test_x):,} test images",
            f"groups: {', '.join('+'.join(map(str, group)) for group in split.groups)}",
            f"bad behaviour: putting a {target} into its group, from {counts['bad examples']} test {target}s;"
            f" {counts['test target']:,} are held out",
        )
    )


def network_accuracy(result: dict[str, float], split: Split) -> float:
    """Accuracy on the whole test set from that on its parts."""
    parts = ("bad examples", "test target", "test other")
    sizes = [len(split.sets[part][1]) for part in parts]
    return sum(result[part] * size for part, size in zip(parts, sizes, strict=True)) / sum(sizes)


def show(report: MnistReport) -> None:
    """Print accuracies in percent, a row for each variant."""
    target = report.target_class
    columns = [name for name in COLUMNS if any(name in row for row in report.results.values())]
    rows = [
        [variant, *(f"{row[name]:,}" if name == "edges cut" else f"{100 * row[name]:.1f}" for name in columns)]
        for variant, row in report.results.items()
    ]
    header = ["", *(name.replace("target", f"{target}s") for name in columns)]
    print_table(header, rows, f"share in its group, % (target: {target}); data: {report.source}")
    print(f"test accuracy of the network before anything is cut: {100 * report.test_accuracy:.2f} %")
