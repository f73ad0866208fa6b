import json, os, shutil
from pathlib import Path
import jax
import orbax.checkpoint as ocp
def latest_step(root):
    root=Path(root)
    if not root.is_dir(): return None
    steps=[int(p.name) for p in root.iterdir() if p.name.isdigit() and (p/"extra.json").exists()]
    return max(steps, default=None)
def save(d, tree, extra):
    d=Path(d).absolute(); tmp=d.parent/(f".{d.name}.tmp"); shutil.rmtree(tmp, ignore_errors=True); d.parent.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as c:
        c.save(tmp/"tree", tree); c.wait_until_finished()
    (tmp/"extra.json").write_text(json.dumps(extra)); shutil.rmtree(d, ignore_errors=True); os.rename(tmp, d)
def restore(d, abstract):
    d=Path(d).absolute()
    with ocp.StandardCheckpointer() as c:
        return c.restore(d/"tree", abstract), json.loads((d/"extra.json").read_text())
