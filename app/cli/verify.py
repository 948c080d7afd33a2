"""`cde-server verify`: whether a checkpoint, a running server or a set of golden cases gives the right vectors."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import orjson
import typer
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save_file

from app.cli.client import Server, no_server_of_ours, parsed
from app.cli.options import (
    ConfigOption,
    DeviceOption,
    DtypeOption,
    RevisionOption,
    SemanticsOption,
    given_options,
    messages,
    wide_console,
)
from app.corpora import BadCorpus, read_records
from app.domain import FloatArray
from app.errors import ConfigError
from app.goldens import Difference, Goldens
from app.models.loading import LoadOptions, options_named, weights_revision
from app.offline import Offline
from app.references import References
from app.selfcheck import examine
from app.settings_sources import load_settings, without_settings
from app.verification.reference import compare
from app.verification.remote import Answer, Known, checks_of

SEMANTICS = ("semantics", "output_residual", "mask_instruction")

Variant = Literal["train", "hub", "both"]

TAKES = {  # an option that is passed over leaves somebody believing that it was checked
    "--model": {"model", "revision", "semantics", "dtype", "device", "config"},
    "--goldens": {"goldens", "output", "variant", "dtype", "device"},
    "--url": {"url", "api_key", "model", "revision", "device"},
    "--reference": {"reference", "model", "input_", "limit", "trust_remote_code", "python", "revision", "device"},
}


def verify(
    context: typer.Context,
    *,
    model: Annotated[
        str | None, typer.Option(help="Self-check of this checkpoint: Hub id, folder, or builtin/minilm-context")
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="Check a running server, with --model against a copy of its model here")
    ] = None,
    goldens: Annotated[
        Path | None, typer.Option(help="Folder with cases.json, expected.safetensors and a checkpoint")
    ] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Compare --model with the code that it ships, on the texts of --input")
    ] = False,
    input_: Annotated[Path | None, typer.Option("--input", help="Texts: .txt, .jsonl or .parquet")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Texts of --input to take, from the top")] = 16,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let --reference run that code on this machine")
    ] = False,
    python: Annotated[
        str, typer.Option(help="Interpreter for that code, with torch and transformers")
    ] = sys.executable,
    api_key: Annotated[
        str | None, typer.Option(envvar="CDE_API_KEY", help="API key, where the server at --url wants one")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where the arrays of --goldens go (.safetensors)")] = None,
    variant: Annotated[Variant, typer.Option(help="Which semantics of --goldens to run")] = "both",
    revision: RevisionOption = None,
    semantics: SemanticsOption = "training",
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    config: ConfigOption = None,
) -> None:
    """Hold vectors against known ones; exit 1 where they differ.

    --model M: fixed texts against the vectors that the same weights gave before, as at every start of the server.
    --url URL: a running server, through its API. --reference: M's own code, in a process of its own, against
    each of our semantics. --goldens FOLDER: golden cases, as in tests/goldens.
    """
    _check_options(given_options(context))
    options = LoadOptions(revision=revision, semantics=semantics, dtype=dtype, device=device)
    if goldens is not None:
        ok = _goldens(goldens, output, variant, options)
    elif url is not None:
        ok = _server(Server(url, api_key, None), model, options)
    elif model is None:
        raise typer.BadParameter("name one of --model, --url and --goldens")
    elif reference:
        ok = _reference(model, options, _texts(input_, limit), python, consent=trust_remote_code)
    else:
        ok = _checkpoint(model, options, References(load_settings({}, config).references_dir))
    if not ok:
        raise typer.Exit(1)


def _check_options(given: Mapping[str, str]) -> None:
    """`given`: parameter -> option. Raises typer.BadParameter."""
    chosen = [option for option in TAKES if option in given.values() and option != "--model"]
    if len(chosen) > 1:
        raise typer.BadParameter(f"{' and '.join(chosen)} are different checks: name one")
    way = chosen[0] if chosen else "--model"
    for name, option in given.items():
        if name not in TAKES[way]:
            fitting = " and ".join(other for other, parameters in TAKES.items() if name in parameters)
            raise typer.BadParameter(f"{option} is for {fitting}, and does nothing for {way}: leave it out")


def _checkpoint(model: str, options: LoadOptions, references: References) -> bool:
    with Offline(model, options) as offline:
        outcome, spec = examine(offline.engine, offline.served, references), offline.spec
    if outcome.reference is None:
        where = outcome.kept or "no file: data_dir takes none"
        messages.print(f"nothing was known of {spec.source}, {spec.semantics}; its vectors are now in {where}")
        return True
    table = Table("stage", "distance", "at most", "")
    for finding in outcome.findings:
        table.add_row(finding.stage, f"{finding.distance:.1e}", f"{finding.limit:.1e}", _verdict(finding.ok))
    _print(table, f"{spec.source}, {spec.semantics}, {spec.dtype}")
    messages.print(f"held against {outcome.reference.path}, made by {outcome.reference.made_by}")
    return all(finding.ok for finding in outcome.findings)


def _server(server: Server, model: str | None, options: LoadOptions) -> bool:
    def call(method: str, path: str, body: bytes | None = None) -> Answer:
        response = server.call(method, path, content=body, headers={"Content-Type": "application/json"})
        return Answer(parsed(response), dict(response.headers))

    answer = server.call("GET", "/info")
    info = parsed(answer)
    if not isinstance(info, dict) or "models" not in info:
        raise no_server_of_ours(answer, "no models came")
    wanted = info["models"]
    if model is not None:
        weights = weights_revision(model, options.revision)
        served = ", ".join(f"{m['id']} ({m['weights_sha256'][:12]}…)" for m in wanted)
        wanted = [m for m in wanted if m["weights_sha256"] == weights]
        if not wanted:
            raise ConfigError(f"The weights of {model} ({weights[:12]}…) are not served there, but {served}")
    checked, ok = 0, True
    for entry in wanted:
        if not entry["first_stage"]:
            messages.print(f"{entry['id']} is served without its first stage: nothing can be told from outside")
            continue
        known = _known(entry, model, options)
        table = Table("check", "seen", "at most", "")
        for check in checks_of(call, entry, known):
            table.add_row(check.name, f"{check.seen:.2g}", f"{check.limit:.2g}", _verdict(check.ok))
            ok &= check.ok
        _print(table, f"{entry['id']}, {entry['semantics']}, {entry['dtype']}")
        source = known.source if known else "nothing: --model names a copy of its checkpoint to compute them with"
        messages.print(f"known vectors: {source}")
        checked += 1
    return ok and checked > 0


def _known(entry: dict[str, str], model: str | None, options: LoadOptions) -> Known | None:
    if model is None:
        return Known.shipped(entry)
    same = replace(options_named(entry["semantics"]), revision=options.revision, device=options.device)
    with Offline(model, replace(same, dtype="float32")) as offline:
        return Known.computed(offline)


def _reference(model: str, options: LoadOptions, texts: Sequence[str], python: str, *, consent: bool) -> bool:
    if not consent:
        raise ConfigError(
            f"--reference runs code from {model} on this machine, in a process of its own that may do whatever you "
            f"may. Read that code, then add --trust-remote-code"
        )
    options = replace(options, dtype="float32")
    messages.print(f"running the code of {model} on {len(texts)} texts")
    made_by, found = compare(model, options, texts, python=python, variables=without_settings())
    rows = list(found)
    table = Table("", *SEMANTICS, "max difference", "1 - cos", "")
    for row in rows:
        values = [str(row.settings.get(name, "")).lower() for name in SEMANTICS]
        numbers = f"{row.max_abs_diff:.1e}", f"{1 - row.min_cos:.1e}"
        table.add_row(row.name, *values, *numbers, "same" if row.same else "")
    _print(table, f"{model}: its own code ({made_by}) against this server's")
    matching = [row for row in rows if row.settings and row.same]
    if not matching:
        messages.print(f"none of our semantics gives what the code of {model} gives ({made_by})")
        return False
    best = min(matching, key=lambda row: row.max_abs_diff)
    chosen = ", ".join(f"{name} = {orjson.dumps(value).decode()}" for name, value in best.settings.items())
    messages.print(f"{made_by}: the code of {model} computes {chosen}, to {best.max_abs_diff:.1e}")
    if len(matching) > 1:
        messages.print("these texts do not tell the semantics that are marked as the same apart: give more of them")
    return all(row.same for row in rows if not row.settings)


def _texts(file: Path | None, limit: int) -> list[str]:
    if file is None:
        raise typer.BadParameter("--reference compares on texts of yours: name a file of them with --input")
    texts = [record.text for record in islice(read_records(file), limit)]
    if not texts:
        raise BadCorpus(f"{file} holds no text")
    return texts


def _goldens(goldens: Path, output: Path | None, variant: Variant, options: LoadOptions) -> bool:
    """Golden cases through the serving code, against the reference's arrays."""
    if options.dtype == "int8":
        raise typer.BadParameter("golden cases have tolerances for float32 and bfloat16", param_hint="--dtype")
    cases = Goldens.read(goldens)
    arrays: dict[str, FloatArray] = {}
    differences: list[Difference] = []
    for each in ("train", "hub") if variant == "both" else (variant,):
        for name, array in cases.run(each, options):
            if name not in arrays:
                arrays[name] = array
                differences.append(cases.difference(name, array, options.resolved_dtype()))
    if output is not None:
        save_file(arrays, output)
    worst = max(differences, key=lambda d: d.max_abs_diff / d.limit)
    failed = [d for d in differences if not d.ok]
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for difference in failed:
        console.print(f"FAIL {difference.name}: {difference.max_abs_diff:.2e}, limit {difference.limit:.2e}")
    console.print(
        f"{len(differences)} arrays, {len(failed)} beyond tolerance; worst {worst.name}: max difference "
        f"{worst.max_abs_diff:.2e} (limit {worst.limit:.2e}), lowest cosine {min(d.min_cos for d in differences):.8f}"
    )
    return not failed


def _print(table: Table, title: str) -> None:
    console = wide_console()
    console.print(title, soft_wrap=True)
    console.print(table)


def _verdict(ok: bool) -> str:
    return "ok" if ok else "DIFFERS"
