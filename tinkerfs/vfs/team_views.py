"""Views of other users' training runs by owner, and of training runs by project.

Both consist of links into `/runs`. Nothing is requested before one of their directories is opened.
"""

from collections.abc import Iterable, Iterator

from tinkerfs.api import models
from tinkerfs.context import RequestContext
from tinkerfs.vfs import entities
from tinkerfs.vfs.schema import Directory, DynamicEntries, Node, Symlink

# Other users' runs by owner. The entity is an owner.


def _list_owners(node: Node, ctx: RequestContext) -> Iterator[tuple[str, str]]:
    for owner in node.backend.catalog.shared.get(ctx).by_owner:
        yield owner, owner


def _find_owner(node: Node, owner: str, ctx: RequestContext) -> str | None:
    return owner if owner in node.backend.catalog.shared.get(ctx).by_owner else None


def _runs_of_owner(node: Node, ctx: RequestContext) -> dict[str, models.TrainingRun]:
    return node.backend.catalog.shared.get(ctx).by_owner.get(node.entity, {})


def _list_runs_of_owner(
    node: Node, ctx: RequestContext
) -> Iterable[tuple[str, models.TrainingRun]]:
    return _runs_of_owner(node, ctx).items()


def _find_run_of_owner(node: Node, run_id: str, ctx: RequestContext) -> models.TrainingRun | None:
    return _runs_of_owner(node, ctx).get(run_id)


def _newest_shared_ns(node: Node, ctx: RequestContext) -> int:
    shared = node.backend.catalog.shared.peek(ctx)
    times_ns = (run.last_request_time_ns for run in shared or ())
    changed_ns = node.backend.catalog.shared.last_changed_ns()
    return entities.mtime_or_mount_time(node, changed_ns, *times_ns)


def _newest_of_owner_ns(node: Node, ctx: RequestContext) -> int:
    times_ns = (run.last_request_time_ns for run in _runs_of_owner(node, ctx).values())
    return entities.newest_ns(node, *times_ns)


SHARED = Directory(
    "shared",
    "the training runs of other users that the account may read, by owner",
    (
        DynamicEntries(
            Directory(
                "<owner>",
                "an owner of training runs",
                (
                    DynamicEntries(
                        Symlink(
                            "<run_id>",
                            "a training run of that owner",
                            lambda node, _ctx: entities.run_path(node.entity.run_id),
                            mtime_ns=entities.run_ns,
                            facts=entities.run_xattrs,
                        ),
                        _list_runs_of_owner,
                        _find_run_of_owner,
                    ),
                ),
                _newest_of_owner_ns,
            ),
            _list_owners,
            _find_owner,
        ),
    ),
    _newest_shared_ns,
)


# Runs by project. The entity is a project id.


def _list_projects(node: Node, ctx: RequestContext) -> Iterator[tuple[str, str]]:
    for project_id in node.backend.sessions.project_ids(ctx):
        yield project_id, project_id


def _find_project(node: Node, project_id: str, ctx: RequestContext) -> str | None:
    return project_id if project_id in node.backend.sessions.project_ids(ctx) else None


def _list_runs_of_project(node: Node, ctx: RequestContext) -> Iterator[tuple[str, str]]:
    for run_id in node.backend.sessions.runs_of_project(node.entity, ctx):
        yield run_id, run_id


def _find_run_of_project(node: Node, run_id: str, ctx: RequestContext) -> str | None:
    return run_id if run_id in node.backend.sessions.runs_of_project(node.entity, ctx) else None


PROJECTS = Directory(
    "projects",
    "the training runs of the account's sessions, by project",
    (
        DynamicEntries(
            Directory(
                "<project_id>",
                "a project",
                (
                    DynamicEntries(
                        Symlink(
                            "<run_id>",
                            "a training run of a session of the project",
                            lambda node, _ctx: entities.run_path(node.entity),
                        ),
                        _list_runs_of_project,
                        _find_run_of_project,
                    ),
                ),
            ),
            _list_projects,
            _find_project,
        ),
    ),
)
