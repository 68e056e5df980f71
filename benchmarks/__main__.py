"""`python -m benchmarks NAME [options]`; every benchmark writes its figures to benchmarks/results/."""

import sys


def main() -> None:
    """Run the benchmark that the command line names."""
    if sys.argv[1:2] == ["gpu"]:  # a machine with a GPU need not have what the other benchmarks import
        from benchmarks.gpu.command import main as gpu

        sys.exit(gpu(sys.argv[2:]))
    import tyro

    from benchmarks.commands import COMMANDS

    description = "Run a benchmark. One more, gpu, has options of its own: python -m benchmarks gpu --help"
    tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="python -m benchmarks", description=description)


if __name__ == "__main__":
    main()
