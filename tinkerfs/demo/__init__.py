"""A server of the Tinker API's contract, with a sample account, made of the standard library.

`tinkerfs demo` mounts on it, and the tests of everything else run against it: real sockets, signed
URLs on a second origin, a journal of the requests, faults on demand. It knows nothing of the rest
of the package, so that what it promises and what the client believes cannot agree by accident.

    server      DemoServer: the two origins, started and stopped together
    api, store  what the two origins answer
    http        requests and answers over a socket, and the faults on their way
    account     the records, and how they change      catalogue  how they are made up
    wire        records as JSON                       profiles   how known servers differ
    archive     checkpoints as files and tars         content    bytes computed where they are read
    faults, journal, ranges, signing
"""
