"""The text of the mount's own README.md."""

TEXT = b"""\
# Your Tinker training runs and checkpoints, as files

    runs/<run_id>/info.json                          the training run
    runs/<run_id>/latest, latest_sampler             its newest checkpoints
    runs/<run_id>/checkpoints/<kind>/<name>/         one checkpoint:
        info.json      weights info (base model, LoRA rank ...) and the checkpoint's record
        archive_url    a fresh signed URL of the archive; requested when you read it
        published      1 or 0; write 1 to publish, 0 to unpublish
        expires_at     a time or "never"; write 12h, 30d, seconds, an RFC 3339 time, or never
        export         of a training checkpoint: write 1h to export it, if the server has no archive
        tinker_path    tinker://<run_id>/<kind>/<name>
        files/         the weight files; only the blocks that you read are downloaded
        archive.tar    the archive; tensors.json: name, dtype and shape of its tensors
    checkpoints/, published/, expiring/              the same checkpoints, as links
    models/                                          runs by base model
    shared/<owner>/<run_id>                          runs of other users that you may read
    projects/<project_id>/<run_id>                   runs by project, from your sessions
    sessions/, samplers/                             sessions with their runs and samplers
    sessions/<session_id>/trace.pftrace              its timeline, for https://ui.perfetto.dev
    adapters/<run_id>@<kind>@<name>                  the checkpoints as engines load them

Try:

    ls -lt runs                                      newest runs first
    jq .lora_rank runs/*/checkpoints/weights/*/info.json
    echo 1 > runs/<run_id>/latest/published
    ls -lh runs/<run_id>/latest_sampler/files/
    curl -o archive.tar "$(cat runs/<run_id>/latest_sampler/archive_url)"
    tinkerfs prefetch runs/<run_id>/latest_sampler   download its files to the cache
    tinkerfs get runs/<run_id>/latest_sampler DIR    copy its files to DIR
    rm -r runs/<run_id>/checkpoints/weights/0001     delete that checkpoint permanently
    tinkerfs undelete .tinkerfs/trash/<name>         restore it, if mounted with --trash

ls, find, grep -r and du are cheap: they never request an archive from the server.

Only checkpoints can be removed. A command that tries to remove anything else (rm -rf of a run,
find -delete) gets "Operation not permitted" for every removal until it has not tried for a minute.

mv, cp -a, rsync and backup programs do not copy weights off the mount, because files and
archive.tar are links. So mv off the mount does not remove a checkpoint: use tinkerfs get, then
rm -r.

When a command fails, the server's error message is in

    .tinkerfs/errors        the last 100 failures
    .tinkerfs/changes       the last 100 changes, the processes that made them, and the outcomes
    .tinkerfs/access_log    file operations as they happen, while you cat it; not listed
    .tinkerfs/stats.json    API requests, cache hits, pending requests
    .tinkerfs/trash/        removed checkpoints, if mounted with --trash, until their deletion
    .tinkerfs/refresh       write anything to invalidate all cached metadata
"""
