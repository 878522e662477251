"""`moebius verify compare`: whether two traces are of the same training, and where they part."""

from launch.arguments import Parser
from launch.errors import run
from launch.verify.output import add_outputs, finish


def main(argv: list[str]) -> int:
    """Compare two traces phase by phase and report."""
    parser = Parser(
        prog="moebius verify compare",
        description="Compare two traces of `moebius verify record`: data, weights, forward, backward, update, and the "
        "steps after them. Names the first module or parameter that differs, and the likely fault.",
    )
    parser.add_argument("reference", metavar="A", help="the trace that is right: a folder")
    parser.add_argument("other", metavar="B", help="the trace to compare with it")
    add_outputs(parser)
    args = parser.parse_args(argv)

    def compare() -> int:
        from pathlib import Path

        from trainer.verify.compare import compare
        from trainer.verify.summary import report

        return finish(report(compare(Path(args.reference), Path(args.other))), args)

    return run(compare, debug=False)
