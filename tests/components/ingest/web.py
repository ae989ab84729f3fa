"""What small web servers answer: files with ranges, without, of unknown length; the hub's API."""

import hashlib
from pathlib import Path
from typing import Any

from aiohttp import web

from tests.web_server import Route


def files(folder: Path) -> Route:
    """Files with ETag and ranges, under /files/."""

    async def answer(request: web.Request) -> web.StreamResponse:
        path = folder / request.match_info["name"]
        return web.FileResponse(path) if path.is_file() else web.Response(status=404)

    return "*", "/files/{name}", answer


def whole(folder: Path) -> Route:
    """Files of a server that knows no ranges, under /whole/."""

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(body=(folder / request.match_info["name"]).read_bytes())

    return "*", "/whole/{name}", answer


def streamed(folder: Path) -> Route:
    """Files that are made as they are sent, so that nobody knows their length, under /streamed/."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        if request.method != "HEAD":
            raw = (folder / request.match_info["name"]).read_bytes()
            for start in range(0, len(raw), 10_000):
                await response.write(raw[start : start + 10_000])
        await response.write_eof()
        return response

    return "*", "/streamed/{name}", answer


def hub(folder: Path, name: str) -> list[Route]:
    """The part of the Hugging Face hub's API that reading a data set takes, over a local copy."""
    commit = "0123456789abcdef0123456789abcdef01234567"

    def entry(path: Path) -> dict[str, Any]:
        inside = path.relative_to(folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": inside, "oid": "0" * 40, "size": 0}
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "path": inside, "oid": oid, "size": path.stat().st_size}

    async def info(_: web.Request) -> web.Response:
        return web.json_response({"id": name, "sha": commit, "private": False, "siblings": []})

    async def tree(request: web.Request) -> web.Response:
        target = folder / request.match_info.get("path", "")
        if not target.is_dir():
            headers = {"X-Error-Code": "EntryNotFound"}
            return web.json_response({"error": "none"}, status=404, headers=headers)
        deep = request.query.get("recursive", "").lower() in ("1", "true")
        found = sorted(target.rglob("*") if deep else target.iterdir())
        return web.json_response([entry(path) for path in found])

    async def paths(request: web.Request) -> web.Response:
        if request.content_type.endswith("json"):
            wanted = (await request.json())["paths"]
        else:
            wanted = (await request.post()).getall("paths")
        found = [folder / str(path) for path in wanted]
        return web.json_response([entry(path) for path in found if path.exists()])

    async def resolve(request: web.Request) -> web.StreamResponse:
        path = folder / request.match_info["path"]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry(path)["oid"]}"'}
        return web.FileResponse(path, headers=headers)

    api = f"/api/datasets/{name}"
    return [
        ("GET", api, info),
        ("GET", f"{api}/revision/{{revision}}", info),
        ("GET", f"{api}/tree/{{revision}}", tree),
        ("GET", f"{api}/tree/{{revision}}/{{path:.+}}", tree),
        ("POST", f"{api}/paths-info/{{revision}}", paths),
        ("*", f"/datasets/{name}/resolve/{{revision}}/{{path:.+}}", resolve),
    ]
