"""Results on the Hugging Face hub: a repository opened before the work begins, and filled when it is done.

The token is the one that huggingface_hub finds: HF_TOKEN, or what `hf auth login` left.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from jaxft.errors import InputError, RunError

# HTTPError of whichever httpx huggingface_hub speaks through
UNREACHED = cast(type[Exception], HfHubHTTPError.__bases__[0])
MADE_BY_HUB = {".gitattributes"}


def open_repository(name: str, *, private: bool, exist_ok: bool) -> str:
    """Makes a model repository on the hub, or finds it empty, before anything is computed; returns OWNER/NAME.

    name: OWNER/NAME, or NAME for one of the token's own. private: only for a new one. exist_ok: a repository that holds
    files already is taken too, and what is pushed becomes its next commit. Raises InputError where there is no token,
    the hub refuses, the name is taken, or there is no connection.
    """
    if get_token() is None:
        raise InputError(
            "--push_to_hub: there is no token for the hub; set HF_TOKEN, or run `hf auth login`, to one that may write"
        )
    api = HfApi()
    with explained(f"--push_to_hub {name}"):
        user = api.whoami()["name"]
        full = name if "/" in name else f"{user}/{name}"
        try:
            api.create_repo(full, private=private)
        except HfHubHTTPError as refusal:
            if refusal.response.status_code != 409:
                raise
            held = set(api.list_repo_files(full)) - MADE_BY_HUB
            if held and not exist_ok:
                raise InputError(
                    f"--push_to_hub: {full} is there already and holds {len(held)} files; name another by "
                    "--hub_model_id, or add to it with --hub_exist_ok"
                ) from refusal
    return full


def push(repository: str, directory: Path, message: str, files: Sequence[str] = (), leave: Sequence[str] = ()) -> str:
    """Uploads a directory, or only some `files` of it, as one commit; returns its address.

    leave: patterns of what stays here. Raises RunError where it does not come through: what was to be uploaded stays
    where it is, and the message says how to try again.
    """
    print(f"pushing {directory} to {repository}", file=sys.stderr, flush=True)
    try:
        with explained(f"{directory} is whole, but not on the hub"):
            commit = HfApi().upload_folder(
                repo_id=repository, folder_path=directory, commit_message=message,
                allow_patterns=list(files) or None, ignore_patterns=list(leave) or None,
            )  # fmt: skip
    except InputError as failure:
        chosen = " ".join(f"--include {file!r}" for file in files) + " ".join(f"--exclude {one!r}" for one in leave)
        raise RunError(f"{failure}. Later: hf upload {repository} {directory} . {chosen}".rstrip()) from failure
    return str(commit.commit_url)


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turns the hub's failures into an InputError that says what is to be done."""
    try:
        yield
    except HFValidationError as error:
        raise InputError(f"{what}: {error}; name OWNER/NAME") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        said = (error.server_message or str(error).splitlines()[0]).rstrip(".")
        help = {
            401: "the hub does not accept the token; is HF_TOKEN, or what `hf auth login` left, still valid?",
            403: "the token may not write there; take one that may, or name a repository of your own by --hub_model_id",
            404: "there is no such owner or repository, or the token may not see it; check the name",
        }.get(status, "try again later" if status >= 500 else "check the name and the files")
        raise InputError(f"{what}: the hub refused ({status}: {said}); {help}") from error
    except OfflineModeIsEnabled as error:
        raise InputError(f"{what}: HF_HUB_OFFLINE is set, and this needs the hub; unset it") from error
    except UNREACHED as error:
        raise InputError(f"{what}: the hub cannot be reached ({error}); is there a network?") from error
    except ValueError as error:  # the hub's word on a README.md or on large files
        raise InputError(f"{what}: {' '.join(str(error).split())}") from error
