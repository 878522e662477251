"""`moebius verify run`: whether two long runs train the same model, by their metrics."""

from launch.arguments import Parser
from launch.errors import run
from launch.verify.output import add_outputs, finish


def main(argv: list[str]) -> int:
    """Compare two metrics files and report."""
    parser = Parser(
        prog="moebius verify run",
        description="Compare the losses and gradient norms of two runs, as recorded in their metrics.jsonl.",
    )
    parser.add_argument("reference", metavar="A", help="the run that is right: its directory, or its metrics.jsonl")
    parser.add_argument("other", metavar="B", help="the run to compare with it")
    bounds = parser.add_argument_group("bounds", "on losses a bound holds if the relative or the absolute one does")
    add = bounds.add_argument
    add("--first-loss", metavar="X", type=_bound, default=0.005, help="first loss, relative (0.005)")
    add("--first-loss-absolute", metavar="X", type=_bound, default=0.005, help="first loss, absolute (0.005)")
    add("--mean-loss", metavar="X", type=_bound, default=0.01, help="mean loss, relative (0.01)")
    add("--mean-loss-absolute", metavar="X", type=_bound, default=0.01, help="mean loss, absolute (0.01)")
    add("--norm", metavar="X", type=_bound, default=0.1, help="mean relative difference of gradient norms (0.1)")
    parser.add_argument("--common", action="store_true", help="compare the steps that both have; else all must be")
    add_outputs(parser)
    args = parser.parse_args(argv)

    def compare() -> int:
        from trainer.verify.runs import Bounds, compare

        bounds = Bounds(args.first_loss, args.first_loss_absolute, args.mean_loss, args.mean_loss_absolute, args.norm)
        return finish(compare(args.reference, args.other, bounds, args.common), args)

    return run(compare, debug=False)


def _bound(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError
    return value
