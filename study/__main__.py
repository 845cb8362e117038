"""`python -m study VERB`: the matrix of runs, what perplexity does not show, and the report of both."""

from collections.abc import Sequence

from fibattn.cli.door import Program, enter

PROGRAM = Program(
    name="python -m study",
    about="one paper's matrix of models, trained, probed and reported on",
    verbs={
        "run": "train and evaluate a matrix of models, and report on them beside the paper's",
        "far": "try forms of far reading, each trained as a step of the ladder",
        "parts": "try parts that the default recipe does not have",
        "probe": "retrieval, recall, variable tracking, public tasks, latency, operations",
        "outside": "another project's program on the same text, as a baseline",
        "report": "write the page and the tables from the results",
    },
    package="study.commands",
    resumed={"run": "; what was finished is kept, the same command goes on from there"},
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status, as `fibattn` does."""
    return enter(PROGRAM, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
