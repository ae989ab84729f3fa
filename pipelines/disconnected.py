"""The page that lists what a cluster without internet access needs mirrored: images and models.

Everything on it is read from the files that name it: the manifests, the Containerfile and the
recipes that ship with nudge.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import yaml

from nudge.components.common.core.images import DATA_IMAGE, TRAIN_IMAGE
from nudge.components.common.core.recipe import read_recipe
from nudge.components.upload.settings import UploadSettings
from nudge.pipelines import recipes

OVERLAY = Path("manifests") / "overlays" / "disconnected"
PAGE = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
    """\
# Without the internet

What a cluster needs of nudge that cannot reach the internet, and how it gets there. OpenShift AI
itself, its operators, and Kueue and Kubeflow Trainer where they are used, are mirrored as their
own documentation says. Made by `nudge compile` from the manifests, the Containerfile, the images'
requirement files and the recipes.

## Images

| image | for |
|---|---|
{% for image, uses in images.items() %}
| `{{ image }}` | {{ uses | join(', ') }} |
{% endfor %}

[imageset.yaml](imageset.yaml) lists them for oc-mirror. Where the internet is:

```
oc mirror --v2 -c manifests/overlays/disconnected/imageset.yaml file://mirrored
```

and where the cluster is, with the folder `mirrored` carried over:

```
oc mirror --v2 -c manifests/overlays/disconnected/imageset.yaml --from file://mirrored docker://mirror.example.com
sed -i s/mirror.example.com/YOUR-MIRROR/g manifests/overlays/disconnected/kustomization.yaml
oc apply -k manifests/overlays/disconnected
```

oc-mirror keeps the names below the registry's, which are those that the overlay asks for. The base
image is needed only to build images inside. Pipelines that name the mirror's images are compiled,
and uploaded once the pipelines server is ready:

```
export NUDGE_DATA_IMAGE={{ data_image }}
export NUDGE_TRAIN_IMAGE={{ train_image }}
nudge compile --into build/pipelines
nudge upload build/pipelines/train_and_serve.yaml
```

`oc apply -n nudge -f build/pipelines/kubernetes` makes all of them at once instead.

## Models

| recipe | starts from | where that is |
|---|---|---|
{% for row in models %}
| `{{ row.recipe }}` | `{{ row.uri }}` | {{ row.where }} |
{% endfor %}

A model of the hub is carried as a folder into the data connection's bucket, and a recipe names it
there (`base_model: s3://nudge/base/NAME`):

```
hf download OWNER/NAME --local-dir NAME
aws s3 cp --recursive NAME s3://nudge/base/NAME
```

## Packages

No step installs anything when it runs, so packages are needed only where the images are built.
`make wheels` puts them, checked against their hashes, into `images/wheels`; `make images OFFLINE=1`
builds from that folder without a network. A mirror of the package index does as well:
`make images PIP_CONF=pip.conf`.

The packages and their hashes are in `images/requirements/`, exported from `uv.lock`: Python 3.11 to
3.14 on x86_64 and aarch64.
"""
)


def pages(root: Path) -> dict[Path, str]:
    """The overlay's page and its ImageSetConfiguration (of oc-mirror v2), by their paths below
    ``root``, a checkout."""
    images = needed_images(root)
    page = PAGE.render(
        images=images, models=base_models(),
        data_image=mirrored(DATA_IMAGE), train_image=mirrored(TRAIN_IMAGE),
    )  # fmt: skip
    return {OVERLAY / "README.md": page, OVERLAY / "imageset.yaml": image_set(list(images))}


def image_set(images: list[str]) -> str:
    """The ImageSetConfiguration of these images; one with a digest goes by that alone, because the
    tools that copy images take a tag or a digest."""
    names = [re.sub(r":[^:/@]+@", "@", image) for image in images]
    values = {
        "apiVersion": "mirror.openshift.io/v2alpha1",
        "kind": "ImageSetConfiguration",
        "mirror": {"additionalImages": [{"name": name} for name in names]},
    }
    head = "# Made by `nudge compile`; README.md beside this says how it is used.\n"
    return head + yaml.safe_dump(values, sort_keys=False)


def mirrored(image: str) -> str:
    """The name of an image in the mirror."""
    return "YOUR-MIRROR/" + image.partition("/")[2]


def needed_images(root: Path) -> dict[str, list[str]]:
    """Every image that the manifests, the pipelines and the builds name, with what names it."""
    found: dict[str, set[str]] = {}

    def note(image: str, use: str) -> None:
        found.setdefault(image, set()).add(use)

    note(DATA_IMAGE, "steps of the pipelines")
    note(TRAIN_IMAGE, "steps of the pipelines")
    note(UploadSettings.base_image, "models that are uploaded as images (upload.base_image)")
    manifests = root / "manifests"
    made = (root / OVERLAY, manifests / "pipelines")
    for path in sorted(manifests.rglob("*.yaml")):
        if path.parent in made or path.name == "kustomization.yaml":
            continue
        for each in yaml.safe_load_all(path.read_text(encoding="utf-8")):
            for image in _images_in(each):
                note(image, f"{each['kind']} {each['metadata']['name']}")
    text = (root / "images" / "Containerfile").read_text(encoding="utf-8")
    for image in re.findall(r"^ARG BASE_IMAGE=(\S+)", text, re.MULTILINE):
        note(image, "base of the images")
    return {image: sorted(found[image]) for image in sorted(found)}


def _images_in(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for each in node:
            yield from _images_in(each)
    elif isinstance(node, dict):
        if isinstance(node.get("image"), str):
            yield node["image"]
        if node.get("kind") == "DockerImage":
            yield str(node["name"])
        for each in node.values():
            yield from _images_in(each)


def base_models() -> list[dict[str, str]]:
    """The model that each shipped recipe starts from, and where that is."""
    rows = []
    for name in recipes.shipped():
        uri = str(read_recipe(recipes.shipped_text(name)).get("base_model", ""))
        uri = uri.partition("?else=")[2] or uri
        if uri:
            inside = uri.startswith("package://")
            where = "in the train image, as a package" if inside else "to be carried over"
            rows.append({"recipe": name, "uri": uri, "where": where})
    return rows
