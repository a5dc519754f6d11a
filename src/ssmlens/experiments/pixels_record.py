"""The pages of `ssmlens reproduce` about attacks on pixel sequences, from the measured runs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ssmlens.experiments import pixels_checks, pixels_claims, pixels_gradient, pixels_noise, pixels_target
from ssmlens.experiments.base import Claim, claims_config, claims_counted, claims_table
from ssmlens.experiments.pixels_claims import Sides
from ssmlens.experiments.pixels_gradient import named
from ssmlens.experiments.pixels_measure import Plan
from ssmlens.experiments.pixels_models import GRADIENT_WIDTH, PAPER_WIDTHS, SCALES, TARGET_WIDTHS, Model, Scale
from ssmlens.experiments.pixels_runs import Found
from ssmlens.experiments.recall import PAPER_LENGTH
from ssmlens.results import Figure, Map, Record, Series, Table, Value, provenance
from ssmlens.tasks.images import ImageSet

Results = Mapping[str, Sequence[dict[str, Any]]]  # by model, seed after seed


def record(
    scale_name: str, images: ImageSet, found: Found, results: Results, plan: Plan, made_by: Mapping[str, dict[str, Any] | None]
) -> Record:  # fmt: skip
    scale, n, k, learned = SCALES[scale_name], images.length, len(images.classes), scale_name != "smoke"
    # ---- noise: Tables 1 and 3
    regions, sides = sorted(plan.noise), [Sides.of_paper(w, n) for w in PAPER_WIDTHS]
    claims: list[Claim] = pixels_claims.noise_claims(found, n, k, learned)
    verdict = pixels_noise.sentences(found, sides[1], k)
    tables: list[Table] = [
        pixels_noise.corruption_table(found, regions, n, beside=True),
        pixels_noise.asymmetry_table(found, sides, beside=True),
    ]
    if pixels_noise.changes(found):
        tables.append(pixels_noise.change_table(found, [sides[1], sides[3]]))
    maps: list[Map] = [pixels_noise.corruption_map(found, regions)]
    figures: list[Figure] = [pixels_noise.asymmetry_figure(found, sides)]
    # ---- target attack: Figure 3 (one class) and Figure 10 (mean over all)
    horse = images.classes.index("horse") if "horse" in images.classes else min(7, k - 1)
    sides = [Sides.of_paper(w, n) for w in TARGET_WIDTHS]
    for name, targets in (("Figure 3", [horse]), ("Figure 10", list(range(k)))):
        title = f"target {images.classes[horse]}" if len(targets) == 1 else f"mean of {k} targets"
        identity = name.lower().replace(" ", "")
        claims += pixels_claims.target_claims(found, n, targets, title, name, k, learned)
        tables.append(pixels_target.table(identity, f"{name}: {title}", found, named(plan.target, n), sides, targets))
        for s in sides:
            there = f"{name}: {title}, {s.width} of {n} pixels"
            figures.append(pixels_target.figure(f"{identity}-{s.width}", there, found, s.named(), targets))
    maps.append(pixels_target.by_class(found, sides[0], range(k), images.classes))
    verdict += pixels_target.sentences(found, sides[0], range(k), f"mean of {k} targets", k)
    # ---- gradient attack: ours
    s, attacked = Sides.of_paper(GRADIENT_WIDTH, n), named(plan.gradient, n)
    tables += [pixels_gradient.table(found, attacked, s, plan), pixels_checks.table(found, attacked, plan, n)]
    figures.append(pixels_gradient.figure(found, s, plan))
    maps.append(pixels_gradient.map_of(found, attacked, plan))
    verdict += pixels_gradient.sentences(found, s, plan, k)
    figures.append(_learning(found, results, scale))
    verdict.insert(1, claims_counted(claims, "the paper's signs and orders"))
    if not learned:
        verdict = [
            "Smoke scale: this shows that every part runs. Nothing is learned in so few steps, so the numbers mean nothing."
        ]
    return Record(
        kind="reproduce",
        title=f"Pixel sequences under attack ({scale_name} scale)",
        verdict=verdict,
        tables=[claims_table(claims), *tables],
        figures=figures,
        maps=maps,
        notes=[*_notes(scale_name, scale, images, results), *_origin(made_by)],
        config={
            "item": "pixels", "scale": scale_name, "models": {m: len(r) for m, r in results.items()}, "sizes": asdict(scale),
            "images": {"name": images.name, "sha256": images.sha256}, "claims": claims_config(claims),
        },
        seeds=list(range(max(map(len, results.values())))),
        provenance=provenance(),
    )  # fmt: skip


def _learning(found: Found, results: Results, scale: Scale) -> Figure:
    series = []
    for name, runs in found.items():
        steps = [float(step) for step, _ in results[name][0]["accuracy"]]
        values = [Value.mean([100 * r["accuracy"][i][1] for r in results[name]]) for i in range(len(steps))]
        series.append(
            Series(
                name=runs.name,
                x=steps,
                y=[v.value for v in values],
                stderr=[v.stderr or 0.0 for v in values],
                group=runs.name,
            )
        )
    kept = scale.validation_images
    images = f"{kept:,} training images that are not trained on" if kept else "the test images"
    return Figure(
        id="learning", title="Clean accuracy over training", x_label="step", y_label="accuracy (%)", series=series,
        meaning=f"After every epoch, on {images}; nothing is chosen by it.", method="Mean over seeds; bars are standard errors over seeds.",
    )  # fmt: skip


def _notes(scale_name: str, scale: Scale, images: ImageSet, results: Results) -> list[str]:
    every = [r for runs in results.values() for r in runs]
    notes = [
        f"Images: {images.name}, {len(images.train) - scale.validation_images:,} to train on and {len(images.test):,} to test on, {images.height} × {images.width} pixels "
        f"({images.length} tokens), {len(images.classes)} classes.",
        f"{scale.layers} layers, d_model {scale.d_model} (RWKV: {2 * scale.d_model}), N = {scale.d_state}; {scale.epochs} epochs, batch {scale.batch_size}, "
        f"AdamW, learning rate {scale.lr:g}, weight decay 0.1, {scale.schedule.replace('_', ' for each ')}; no perturbation in training. The transformer (one head, "
        "learned positions) and H3 have an MLP, 4 times as wide, after each mixer, RWKV its channel mixing, Mamba none.",
        f"{len(every)} runs: "
        + ", ".join(f"{Model.of(m).label} {len(r)} ({r[0]['parameters']:,} parameters)" for m, r in results.items())
        + f"; {sum(r['seconds'] for r in every) / 3600:.2f} hours of training.",
        "Intervals are of 95 % each. What words say of several models at once (more, less, harm) holds for all of them together (Holm's correction); the "
        "comparisons with the paper are each by itself.",
        "Leading pixels are the top rows of an image, trailing ones the bottom rows: position in the sequence and content go together here. Only mean "
        "pooling and attention tell them apart.",
        f"Polarized: one channel at one and one at zero is appended. That is 2 of {scale.d_state + 2} state channels of each inner channel in Mamba and 2 of "
        f"{scale.d_state // 2 + 2} complex ones in H3, but 2 of {2 * scale.d_model + 2} width channels in RWKV-4: not the same dose.",
    ]
    if scale_name == "paper":
        notes.append("The learning curve is of the test images, as all others are trained on, as in the paper.")
    if scale_name == "laptop":
        notes.append(
            "One learning rate for all models, as in the paper, but 5 times the paper's because training is 30 times shorter; set "
            "beforehand, not tuned. A model that needs another may lose by it."
        )
        if {m: len(runs) for m, runs in results.items()} == scale.models:
            notes.append(
                "Five seeds of the models that the paper's main claim is asked of, three of the others: with three of each the claim was at the edge of "
                "chance, and the fourth and fifth were added when the first three had been seen."
            )
    if scale_name != "paper":
        notes.append(
            f"Shorter than the paper's {PAPER_LENGTH:,} pixels: regions are the same shares of the sequence, and a sequence is as many half-lives long: "
            f"Δ's initial range (Mamba, H3) and RWKV-4's initial decay rates are {PAPER_LENGTH / images.length:g} times the paper's, H3's shift is as many times shorter. Compare signs and order with the paper, not heights."
        )
    return notes


def _origin(made_by: Mapping[str, dict[str, Any] | None]) -> list[str]:
    found = {(p["commit"] or f"version {p['ssmlens']}", p["device"], p["threads"]) for p in made_by.values() if p}
    said = [
        f"{commit} on {device} with {threads} thread{'s' * (threads != 1)}" for commit, device, threads in sorted(found)
    ]
    return [f"Runs made by {'; '.join(said)}."] if said else []
