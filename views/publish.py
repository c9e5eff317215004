"""The export of a finished run by itself, with its card, uploaded where asked; and what of that is still owed.

OUT/export.json says what OUT/export holds: the checkpoint it was made from, its files, and where it was uploaded. So a start
knows what an earlier one did not finish, and that it replaces nothing that this program did not write. Without that record, as
before there was one, an export with the very files of the last checkpoint is done; a longer run would replace it, and since
nothing tells then whether its card was edited, refuses to.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from oneloop import checkpoint, configs
from oneloop.configs import BadInput
from oneloop.machine import files
from oneloop.views.loading import load_lines

CARD = "README.md"
"""The one file of an export that people edit, and are done all the same."""
HERE = "path = '.'"
"""How the card's lines begin for one who has the folder; on the hub they have the name of the repository."""


def publish(saved: Path, out: Path, cfg: Any, summary: str, step: int, facts: Mapping[str, Any]) -> str:
    """OUT/export: a checkpoint's export by itself, with its card; uploaded where asked. Returns the lines that load it. What is
    done already is not done again.

    Raises:
        BadInput: OUT/export is not as this program wrote it. StorageError: it could not be written, or not uploaded.
    """
    record, manifest, repository = _record(out), checkpoint.read(saved), cfg.base.hub_model_id or out.name
    if not _whole(out, record, manifest):
        lines = load_lines(saved, ".").replace(HERE, f"{HERE}  # the folder of this file", 1)
        card = functools.partial(_card, out, cfg, summary, step, lines, facts=facts)
        record = _export(saved, out, manifest, card, step)
    if cfg.base.push_to_hub and record["uploaded"] != repository:
        try:
            import huggingface_hub

            repo = huggingface_hub.create_repo(repository, exist_ok=True).repo_id
            where = {"repo_id": repo, "commit_message": f"{step} optimizer steps"}
            huggingface_hub.upload_folder(folder_path=out / "export", ignore_patterns=[CARD], **where)
            if (card := out / "export" / CARD).is_file():
                text = re.sub(f"^{re.escape(HERE)}.*", f"path = {repo!r}", card.read_text("utf-8"), count=1, flags=re.M)
                huggingface_hub.upload_file(path_or_fileobj=text.encode(), path_in_repo=CARD, **where)
        except Exception as error:  # whatever the hub and the network throw
            reason = f"{type(error).__name__}: {str(error)[:500]}"
            text = f"{out}/export was not uploaded to {repository}: {reason}; the same command tries again"
            raise checkpoint.StorageError(text) from None
        files.write(out / "export.json", json.dumps(record | {"uploaded": repository}, indent=1))
    return load_lines(saved, out / "export")


def owed(out: Path, cfg: Any, manifest: dict[str, Any], complete: bool) -> bool:
    """Whether a run whose last checkpoint has this manifest still owes its export, an upload or its page.

    Raises:
        BadInput: OUT/export is not as this program wrote it, and the end of this run would replace it.
    """
    record, (page, metrics) = _record(out), (out / "report.html", out / "metrics.jsonl")
    if not (complete and _whole(out, record, manifest)):
        _refuse_another(out, record)
        return True
    late = not page.exists() or (metrics.exists() and page.stat().st_mtime < metrics.stat().st_mtime)
    return late or (cfg.base.push_to_hub and record["uploaded"] != (cfg.base.hub_model_id or out.name))


def _record(out: Path) -> dict[str, Any]:
    """What export.json says; nothing where it is damaged."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        record = json.loads(files.read_text(out / "export.json"))
        if all((entry["size"], entry["xxh3"]) and ".." not in Path(name).parts for name, entry in record["files"].items()):
            return {name: record[name] for name in ("checkpoint", "files", "uploaded")}
    return {"checkpoint": None, "files": {}, "uploaded": None}


def _whole(out: Path, record: dict[str, Any], manifest: dict[str, Any]) -> bool:
    """Whether OUT/export is the export of the checkpoint with this manifest, by its record or, without one, by its content."""
    made_of, ours = manifest.get("sha256"), record["files"] or checkpoint.part(manifest, False)
    wanted = {name: entry for name, entry in ours.items() if name not in (CARD, "load.py")}
    known = record["checkpoint"] == made_of if record["files"] else bool(wanted)
    return known and not files.flaws(out / "export", wanted)


def _refuse_another(out: Path, record: dict[str, Any]) -> None:
    """Refuse to replace OUT/export where anything in it is not as this program wrote it."""
    export = out / "export"
    there = {name: entry for name, entry in record["files"].items() if os.path.lexists(export / name)}
    if wrong := files.strangers(export, set(there)) or files.flaws(export, there):
        what = f"{export} holds what this program did not write ({', '.join(wrong[:3])})"
        raise BadInput(f"{what}, and the end of this run would replace it; move it away, or give another --base.output-dir")


def _export(saved: Path, out: Path, manifest: dict[str, Any], card: Callable[[list[str]], str], step: int) -> dict[str, Any]:
    """Write OUT/export anew, whole or not at all, and its record, which is returned."""
    export, staged, ours = out / "export", files.staged(out / "export"), checkpoint.part(manifest, False)
    _refuse_another(out, _record(out))
    try:
        for name in ours.keys() - {"load.py"}:
            (staged / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(saved / name, staged / name)
        staged.mkdir(parents=True, exist_ok=True)
        for grid in sorted((out / "samples").glob(f"{step}*.png")):
            shutil.copy(grid, staged / grid.name.replace(f"{step}-", "").replace(f"{step}.", "samples."))
        (staged / CARD).write_text(card([path.name for path in sorted(staged.glob("*.png"))]), "utf-8")
        record = {"checkpoint": manifest["sha256"], "files": files.listed(staged), "uploaded": None}
        if export.exists():
            files.discard(export)
        files.write(out / "export.json", json.dumps(record, indent=1))
        os.rename(staged, export)
        files.flush(out)
    except OSError as error:
        raise checkpoint.refused(export, error, out, sum(entry["size"] for entry in ours.values())) from None
    finally:
        files.erase(staged)
    return record


def _card(out: Path, cfg: Any, summary: str, step: int, lines: str, grids: list[str], facts: Mapping[str, Any]) -> str:
    """The README.md of an export: what it is, how to load it, what it was trained on, how to repeat it. Nothing in it names a
    path of this machine. Its head is what the hub's pages read: `facts` are the task's, such as base_model and license."""
    task = configs.task_group(cfg)
    head = {"library_name": "diffusers"} | dict(facts)
    head["tags"] = ["diffusers", "oneloop", task, *(tag for tag in facts.get("tags", ()) if tag != task)]
    text = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items())  # JSON is YAML
    settings = configs.portable(configs.to_dict(cfg), cfg)
    settings["base"]["output_dir"] = None
    images = "\n".join(f"![{name}]({name})" for name in grids)
    return f"""---
{text}
---
# {out.name}

Trained with oneloop's task `{task}` for {step:,} optimizer steps on {configs.portable(summary, cfg)}.

```python
{configs.portable(lines, cfg)}
```

{images}

These settings, in a file, repeat the run: `python loop.py settings.json`.

```json
{json.dumps(settings, indent=2)}
```
"""
