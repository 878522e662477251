"""`moebius plot`: the loss curve of a run as a picture."""

from launch.arguments import Parser
from launch.errors import run


def main(argv: list[str]) -> int:
    """Draw the losses of a run directory's metrics.jsonl."""
    parser = Parser(prog="moebius plot", description="Draw training, validation and bigram loss of a run.")
    parser.add_argument("run_dir", metavar="RUN_DIR", help="directory of the run")
    parser.add_argument("--out", metavar="FILE", default="loss.png", help="picture to write (default: loss.png)")
    parser.add_argument("--title", default="", help="title above the picture")
    args = parser.parse_args(argv)

    def draw() -> int:
        from trainer.metrics.plot import plot_losses

        plot_losses(args.run_dir, args.out, args.title)
        print(args.out)
        return 0

    return run(draw, debug=False)
