"""A finished run for other tools and people: `ema merge`, `ema push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ema_scale.cli.app import app, console
from ema_scale.cli.numbers import whole
from ema_scale.core.disk import refuse_link_outside
from ema_scale.core.errors import UserError
from ema_scale.core.run_dir import RunDir, is_run
from ema_scale.core.text import quantity

RunPath = Annotated[Path, typer.Argument(help="a trained run's folder")]


@app.command()
def merge(
    run: RunPath,
    out: Annotated[Path, typer.Argument(help="a new folder for the merged model")],
    checkpoint: Annotated[int | None, whole(help="a step whose checkpoint is merged instead")] = None,
) -> None:
    """Merge a run's adapter into its base model.

    The result is a checkpoint with config and tokenizer, in the base's dtype.
    """
    from ema_scale.models.merge import merge_adapter
    from ema_scale.recipe import load_recipe

    folder = _adapter(run, checkpoint)
    console.print(f"wrote {merge_adapter(load_recipe(RunDir(run).recipe_path).model, folder, out)}")


@app.command()
def push(
    run: RunPath,
    repo: Annotated[str, typer.Argument(help="the repository on the hub: owner/name")],
    public: Annotated[bool, typer.Option("--public", help="create it public; default: private")] = False,
    dry_run: Annotated[bool, typer.Option(help="print what would be uploaded, upload nothing")] = False,
) -> None:
    """Upload a run's adapter, with its model card, to the hub.

    The key is read from HF_TOKEN or from `hf auth login`. Answers, judgements and training rows stay here.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    from ema_scale.report.model_card import write_card

    folder = _adapter(run, None)
    write_card(RunDir(run))
    for path in folder.rglob("*"):
        refuse_link_outside(path)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in files:
        console.print(f"  {name}")
    if dry_run:
        return
    hub = HfApi()
    try:
        url = hub.create_repo(repo, private=not public, exist_ok=True)
        hub.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload {run.resolve().name}")
    except HFValidationError as error:
        raise UserError(f"{repo}: expected a repository's name as owner/name ({error})") from None
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        hint = "; set HF_TOKEN to a token that may write" if status in (401, 403) else ""
        raise UserError(f"{repo}: the hub refused the upload ({status}){hint}") from None
    except OSError as error:
        raise UserError(f"{repo}: the hub cannot be reached ({error})") from None
    console.print(f"uploaded {quantity(len(files), 'file')} to {url}")


def _adapter(run: Path, step: int | None) -> Path:
    """The folder of a run's adapter. Raises UserError if there is none."""
    if not is_run(run):
        raise UserError(f"{run}: no run here; expected a folder that `ema train` wrote")
    folder = RunDir(run).adapter if step is None else RunDir(run).checkpoints / f"checkpoint-{step}"
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: no adapter there; the run is {RunDir(run).status().state}")
    return folder
