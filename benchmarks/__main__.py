"""`python -m benchmarks VERB`: the measurements that `docs/performance.md` quotes."""

from collections.abc import Sequence

from fibattn.cli.door import Program, enter

PROGRAM = Program(
    name="python -m benchmarks",
    about="how fast it is, on this machine",
    verbs={
        "operator": "the attention operator against dense and masked attention",
        "chosen-blocks": "blocks that queries choose against fixed distances and dense attention (GPU)",
        "decoding": "a decoded token over the length of its context",
        "paged-decode": "attention from pages against attention from rings, many requests at once",
        "batching": "tokens a second of many requests under continuous batching",
        "training-step": "a training step of the project's trainer, and where its time goes (GPU)",
        "context-parallel": "rows cut over the processes of torchrun: right, bytes sent, and how it scales",
        "sharding": "training steps of one GPU against those of several, weights copied or sharded",
        "tile-sweep": "one kernel at a time over its tile sizes (GPU)",
        "compare": "one source tree against another: times, and outputs bit by bit",
    },
    package="benchmarks",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status, as `fibattn` does."""
    return enter(PROGRAM, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
