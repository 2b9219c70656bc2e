"""Program `plan`: a catalogue and a cluster -> sharding, memory, traffic and time of a pretrain run, estimated."""

from recgpt_torchrec import cli
from recgpt_torchrec.config.reports.plan import Plan


def main(config: Plan) -> None:
    """Print the estimate; nothing is read but the manifest of `config.data`, and nothing is written."""
    from recgpt_torchrec.data.reading.preset import apply_preset
    from recgpt_torchrec.distributed.processes import silence_libraries
    from recgpt_torchrec.planning.report import Estimate

    silence_libraries()
    config, lines = apply_preset(config)
    print(*lines, Estimate.of(config).text(), sep="\n")


if __name__ == "__main__":
    cli.run(Plan, main, "recgpt_torchrec.plan")
