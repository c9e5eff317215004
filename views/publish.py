"""The export of a finished run by itself, with its card, uploaded where asked."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oneloop import checkpoint, configs
from oneloop.views.loading import load_lines


def publish(saved: Path, out: Path, cfg: Any, found: str, step: int, facts: Mapping[str, Any]) -> str:
    """OUT/export: a checkpoint's export by itself, with its card; uploaded where asked. Returns the lines that load it."""
    staged, export, removed = out / ".export.writing", out / "export", out / ".export.removed"
    skipped = {"state", "manifest.json", "load.py"}
    try:
        shutil.copytree(saved, staged, ignore=lambda folder, names: skipped if folder == str(saved) else ())
        for grid in sorted((out / "samples").glob(f"{step}*.png")):
            shutil.copy(grid, staged / grid.name.replace(f"{step}-", "").replace(f"{step}.", "samples."))
        pictures = [path.name for path in sorted(staged.glob("*.png"))]
        (staged / "README.md").write_text(_card(out, cfg, found, step, load_lines(saved, "."), pictures, facts), "utf-8")
    except OSError as error:
        shutil.rmtree(staged, ignore_errors=True)
        needed = sum(
            checkpoint.size(path) if path.is_dir() else path.stat().st_size
            for path in saved.iterdir()
            if path.name not in skipped
        )
        raise checkpoint.refused(export, error, out, needed) from None
    if export.exists():
        os.rename(export, removed)
    os.rename(staged, export)
    shutil.rmtree(removed, ignore_errors=True)
    if cfg.base.push_to_hub:
        import huggingface_hub

        repo = huggingface_hub.create_repo(cfg.base.hub_model_id or out.name, exist_ok=True).repo_id
        huggingface_hub.upload_folder(repo_id=repo, folder_path=export, commit_message=f"{step} optimizer steps")
    return load_lines(saved, export)


def _card(out: Path, cfg: Any, found: str, step: int, lines: str, grids: list[str], facts: Mapping[str, Any]) -> str:
    """The README.md of an export: what it is, how to load it, what it was trained on, how to repeat it. Nothing in it names a
    place on this machine. Its head is what the hub's pages read: `facts` are the task's, such as base_model and license."""
    task = configs.task_group(cfg)
    head = {"library_name": "diffusers"} | dict(facts)
    head["tags"] = ["diffusers", "oneloop", task, *(tag for tag in facts.get("tags", ()) if tag != task)]
    text = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in head.items())  # JSON is YAML
    settings = configs.portable(configs.to_dict(cfg), cfg)
    settings["base"]["output_dir"] = None
    pictures = "\n".join(f"![{name}]({name})" for name in grids)
    return f"""---
{text}
---
# {out.name}

Trained with oneloop's task `{task}` for {step:,} optimizer steps on {configs.portable(found, cfg)}.

```python
{configs.portable(lines, cfg)}
```

{pictures}

These settings, in a file, repeat the run: `python loop.py settings.json`.

```json
{json.dumps(settings, indent=2)}
```
"""
