"""Demo server of the Tinker API, which uses only the standard library.

`tinkerfs demo` mounts it, and the tests of all other packages run against it. It has a sample
account, real sockets, and signed URLs on a second origin.
It imports nothing else of tinkerfs, so that client and server cannot share a misunderstanding of
the API.

    server      DemoServer: both origins, started and stopped together
    api, store  the apps of the two origins: routes and responses
    http        HTTP over sockets                  request        a request
    account     mutable records of the account     sample_data    generated records
    lookup      lookups of runs and checkpoints    mutations      handlers that change checkpoints
    profiles    differences of known servers       serialization  records as JSON
    exports     sessions that export a checkpoint
    archive     checkpoints as files and tars      content        bytes computed on read
    ranges      Range headers                      signing        signed URLs
"""
