"""The typer application. Nothing heavy is imported here."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="ssmlens",
    help="Shows what a state space model forgets, and fixes it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Out = Annotated[Path | None, typer.Option(help="Directory for results.json, report.html and pictures.")]
Json = Annotated[bool, typer.Option("--json", help="Print the record alone on stdout.")]
Side = Annotated[
    int | None, typer.Option(min=2, help="Average images down to this many pixels a side; default: as in training.")
]


def _version(show: bool) -> None:
    if show:
        import ssmlens

        typer.echo(f"ssmlens {ssmlens.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Shows what a state space model forgets, and fixes it."""


@app.command()
def diagnose(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            help="Directories, packaged checkpoints or hub ids; none: the two packaged checkpoints, side by side."
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text to read; default: held-out English from Python's own documentation.")
    ] = None,
    token_ids: Annotated[
        Path | None, typer.Option(help="Token ids instead of text: a file of integers, or a JSON list.")
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(help="For classifiers of images: a directory or archive, datasets:OWNER/NAME or digits."),
    ] = None,
    side: Side = None,
    inputs: Annotated[
        Path | None,
        typer.Option(help="For other classifiers: .npy or .safetensors, floats (batch, length, d_input)."),
    ] = None,
    length: Annotated[int, typer.Option(min=8, help="Tokens in a sequence of text.")] = 512,
    sequences: Annotated[
        int, typer.Option(min=1, help="Sequences, or images; standard errors come from their spread.")
    ] = 8,
    probes: Annotated[int, typer.Option(min=1, help="Random probes a target position.")] = 8,
    exact: Annotated[
        bool, typer.Option("--exact", help="The whole Jacobian instead of probes: one pass for every dimension.")
    ] = False,
    initial: Annotated[
        bool, typer.Option("--initial", help="Measure each model also at a fresh initialisation.")
    ] = False,
    transformer: Annotated[
        bool, typer.Option("--transformer", help="And a transformer of the first model's size, at initialisation.")
    ] = False,
    measure: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this (repeatable): influence, reading, context, smoothing, transitions, bounds, filters, ..."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of probes, bootstrap and initialisation.")] = 0,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or mps.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what an interrupted run left in --out.")] = False,
    out: Out = None,
    json: Json = False,
) -> None:
    """Measure what a model forgets: influence over distance, sharpness over depth, transition spectra; write a page."""
    from ssmlens.cli import diagnose as verb

    verb.run(
        model or [], text, token_ids, images, side, inputs, length, sequences, probes, exact, initial, transformer, measure, seed, device, resume, out, json
    )  # fmt: skip


@app.command()
def reproduce(
    item: Annotated[
        str, typer.Argument(help="A table or figure of the paper, or all; `ssmlens list experiments` names them.")
    ],
    scale: Annotated[str, typer.Option(help="smoke (seconds), laptop (2 cores), paper (a GPU).")] = "laptop",
    variant: Annotated[
        list[str] | None, typer.Option(help="Only this variant (repeatable); default: all of the scale.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds a configuration; default: the scale's own.")] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=0, help="Runs at a time, one thread each; default: the number of cores. 0: in this process."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep finished runs in --out and continue the others.")
    ] = False,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            "--text",
            help="Texts or images instead of the item's own: a path (repeatable) or datasets:NAME of the hub; with all, ITEM=SOURCE.",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Trained models: figure2 asks them instead of its own, pixels attacks them beside its own (repeatable); with all, ITEM=MODEL."
        ),
    ] = None,
    out: Out = None,
    json: Json = False,
) -> None:
    """Repeat a table or figure of the paper, beside the paper's numbers."""
    from ssmlens.cli import reproduce as verb

    verb.run(item, scale, variant, seeds, processes, resume, out, json, data, model)


@app.command()
def needle(
    model: Annotated[
        list[str], typer.Argument(help="Directories, packaged checkpoints or hub ids; several: one page.")
    ],
    text: Annotated[
        Path | None, typer.Option(help="Haystack; default: held-out English from Python's own documentation.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens of text and question, with commas between. Default: 512,1024,2048, or the model's own task."
        ),
    ] = None,
    depths: Annotated[int, typer.Option(min=3, help="Depths, evenly from the beginning of the text to its end.")] = 11,
    prompts: Annotated[int, typer.Option(min=2, help="Of the synthetic needle: prompts a length and depth.")] = 200,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts read at once.")] = 16,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or mps.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Keep what is finished in --out.")] = False,
    out: Out = None,
    json: Json = False,
) -> None:
    """Hide statements in a long text and ask for them: accuracy by length and depth, and the recency index."""
    from ssmlens.cli import needle as verb

    verb.run(model, text, lengths, depths, prompts, batch_size, device, resume, out, json)


@app.command()
def attack(
    checkpoint: Annotated[
        list[str], typer.Argument(help="Classifiers of pixel sequences: directories or .pth files; several: one page.")
    ],
    images: Annotated[
        str, typer.Option(help="A directory or archive of images, datasets:OWNER/NAME or digits; see docs/images.md.")
    ],
    kind: Annotated[
        list[str] | None, typer.Option(help="noise, target or pgd (repeatable); default: all three.")
    ] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(
            help="Pixels to attack, START:STOP (repeatable); --region=-32: the last 32. Default: the paper's."
        ),
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="Class that other images are to be taken for (repeatable); default: all.")
    ] = None,
    eps: Annotated[
        list[str] | None,
        typer.Option(help="Largest change of a pixel in pgd (repeatable); default: 2/255, 8/255, 32/255."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of pgd.")] = 10,
    draws: Annotated[int, typer.Option(min=1, help="Draws of the noise.")] = 1,
    side: Side = None,
    limit: Annotated[int, typer.Option(min=2, help="So many test images, balanced over classes.")] = 500,
    pgd_limit: Annotated[int, typer.Option(min=2, help="So many of them for pgd, which costs more.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of noise, donors and random starts.")] = 0,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or mps.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Keep what is finished in --out.")] = False,
    out: Out = None,
    json: Json = False,
) -> None:
    """Attack classifiers of pixel sequences: noise in a region, pixels of another class, gradients; write a page."""
    from ssmlens.cli import attack as verb

    verb.run(
        checkpoint, images, kind or [], region or [], target or [], eps or [], steps, draws, side, limit, pgd_limit, batch_size, seed, device,
        resume, out, json,
    )  # fmt: skip


@app.command()
def polarize(
    model: Annotated[list[str], typer.Argument(help="Directories, packaged checkpoints, files or hub ids.")],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Directory of the new model; of several models, one below it for each.")
    ],
    ones: Annotated[int, typer.Option(min=0, help="State channels to hold at one.")] = 1,
    zeros: Annotated[int, typer.Option(min=0, help="State channels to hold at zero.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the new channels' input weights.")] = 0,
    json: Json = False,
) -> None:
    """Append state channels at one and at zero to a trained model; its outputs stay until it is trained further."""
    from ssmlens.cli import polarize as verb

    verb.run(model, out, ones, zeros, seed, json)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A TOML file: [model], [data], [training]; see docs/train.md.")],
    out: Annotated[Path | None, typer.Option(help="Directory of the run; default: runs/NAME of the file.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint in --out.")] = False,
    from_: Annotated[
        str | None,
        typer.Option("--from", help="Start from this model instead of a fresh one; the file has no [model] then."),
    ] = None,
    only_polarized: Annotated[
        bool, typer.Option("--only-polarized", help="Train only what `ssmlens polarize` added; needs --from.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Instead of the file's own seed.")] = None,
) -> None:
    """Train a language model from a configuration file."""
    from ssmlens.cli import train as verb

    verb.run(config, out, resume, from_, only_polarized, seed)


@app.command()
def evaluate(
    model: Annotated[list[str], typer.Argument(help="Classifiers: directories of `ssmlens train`, .pth files.")],
    images: Annotated[
        str, typer.Option(help="A directory or archive of images, datasets:OWNER/NAME or digits; see docs/images.md.")
    ],
    side: Side = None,
    limit: Annotated[int | None, typer.Option(min=2, help="So many test images, balanced over classes.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 50,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu, cuda or mps.")] = "auto",
    out: Out = None,
    json: Json = False,
) -> None:
    """Count how many test images classifiers get right, with intervals."""
    from ssmlens.cli import evaluate as verb

    verb.run(model, images, side, limit, batch_size, device, out, json)


@app.command()
def bench(
    part: Annotated[
        list[str] | None, typer.Argument(help="scan, length, layer, step, mixers, long; none: all of them.")
    ] = None,
    scale: Annotated[str, typer.Option(help="smoke (seconds) or laptop (a quarter of an hour on 2 cores).")] = "laptop",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; default: PyTorch's own number.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what --out holds and measure only what is missing.")
    ] = False,
    out: Out = None,
    json: Json = False,
) -> None:
    """Measure how fast the kernels, a layer and a training step are, beside other projects and beside what is possible."""
    from ssmlens.cli import bench as verb

    verb.run(part or [], scale, threads, out, json, resume)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="mixers, experiments, checkpoints; nothing: all.")] = "",
) -> None:
    """Show what there is: mixers, experiments, packaged checkpoints."""
    from ssmlens.cli import listing as verb

    verb.run(what)
