"""``palu push``: publish the model of a run."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import typer

from palu.cli.models import base_name, is_adapter
from palu.cli.options import check_run, option, print_table
from palu.layout import MODEL, MODEL_FILES, PRIVATE
from palu.version import __version__

_SHOWN = 10  # places of secrets that a refusal lists


def push(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run of palu unlearn.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The repository on the hub, such as me/my-llama.")],
    send: Annotated[bool, typer.Option("--send")] = False,
    public: Annotated[bool, typer.Option("--public/--private")] = False,
    checked: Annotated[list[str] | None, option("FILE")] = None,
    changed: Annotated[bool, typer.Option("--changed")] = False,
) -> None:
    """Send an unlearned model to the Hugging Face hub: the files in RUN/model, and nothing of RUN/private.

    Without --send it shows what would be sent, and sends nothing. It refuses where a secret of the run stands in a text
    that would be sent or in a file's name; weights and the tokenizer's vocabulary are not searched.

    Args:
        send: Send it.
        public: Who sees it, if the repository is new.
        checked: A file that you have looked at: what stands there is none of the secrets, perhaps a number like one.
            May be given several times.
        changed: Send the folder as it is, although files were added, changed or deleted since the run.
    """
    check_run(run)
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id
    from tqdm import tqdm

    from palu.report.publish import files_to_publish, secrets_in, text_of
    from palu.report.reading import read_run
    from palu.report.view import verdict

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(f"{name} cannot be a name on the hub; give OWNER/NAME, such as me/my-llama") from None
    files = files_to_publish(run, changed=changed)
    seen = set(checked or ())
    if unknown := seen - {name, *files}:
        raise ValueError(f"--checked {min(unknown)}: it is not sent; files are named as in {run / MODEL}")
    texts = {file: text for file, path in files.items() if (text := text_of(path)) is not None}
    unseen = [one for one in (name, *files) if one not in seen]
    named = {name if one == name else f"the name of {one}": one for one in unseen}
    if places := secrets_in(run, named | {file: texts[file] for file in unseen if file in texts}):
        listed = "; ".join(f"{place.name}, line {place.line}: of {place.row}" for place in places[:_SHOWN])
        more = f"; and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
        raise ValueError(
            f"a secret stands in what would be sent ({listed}{more}); take it out, or give --checked FILE for a file "
            "in which you have looked and it is none"
        )

    sizes = {file: path.stat().st_size for file, path in files.items()}
    searched = {file: "no" if file not in texts else "by you" if file in seen else "yes" for file in files}
    shown = [(file, f"{tqdm.format_sizeof(size)}B", searched[file]) for file, size in sizes.items()]
    print_table((str(run / MODEL), "size", "searched for secrets"), shown)
    print(f"outcome of the run: {verdict(read_run(run / PRIVATE)[1]['outcome'])}")
    if (base := _base_folder(run / MODEL)) is not None:
        print(f"adapter_config.json names the base model as {base}, a folder here, from which nobody else can load it")
    total = f"{len(files)} files, {tqdm.format_sizeof(sum(sizes.values()))}B"
    visibility = "public" if public else "private"
    if send:
        print(f"sent {total}, to {_send(files, name, public=public)} ({visibility})")
    else:
        print(f"{total}, for {name} ({visibility}); nothing was sent: add --send to send it")


def _base_folder(model: Path) -> str | None:
    """Return the base of an adapter if it is a folder of this machine's."""
    base = base_name(str(model)) if is_adapter(str(model)) else None
    return base if base is not None and (Path(base).is_absolute() or Path(base).exists()) else None


def _send(files: Mapping[str, Path], name: str, *, public: bool) -> str:
    """Send files in one commit, which deletes those that an earlier push has left; return the repository's address."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name="palu", library_version=__version__)
    try:
        repo = api.create_repo(name, private=not public, exist_ok=True)
        about = api.model_info(repo.repo_id)
        if about.private == public:
            it_is = "private" if about.private else "public"
            raise ValueError(f"{repo.repo_id} is there already, and {it_is}; give --{it_is}, or another name")
        # Weights in other parts than today's would be loaded in their place.
        there = {file.rfilename for file in about.siblings or ()} - files.keys()
        old = sorted(file for file in there if any(fnmatch(file, pattern) for pattern in MODEL_FILES))
        operations: list[Any] = [*(CommitOperationDelete(file) for file in old)]
        operations += [CommitOperationAdd(file, path) for file, path in files.items()]
        api.create_commit(repo.repo_id, operations, commit_message=f"Unlearned model, by palu {__version__}")
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            why = "it does not know you; log in by hf auth login, or set HF_TOKEN to a token that may write"
        elif status == 403:
            why = "you may not write there; give a name of your own, or log in with a token that may write"
        else:
            why = f"{status}, {error.server_message or error}"
        raise ValueError(f"the hub refuses {name}: {why}") from error
    except ValueError:
        raise
    except Exception as error:  # of whichever HTTP library huggingface_hub uses
        raise ConnectionError(f"the hub cannot be reached ({str(error) or type(error).__name__})") from error
    return str(repo)
