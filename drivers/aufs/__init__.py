"""aufs: a union of many branches in user space, with aufs' on-disk format, served to the kernel over FUSE.

`driver` is what the store uses; it has the kernel or the program ``layerfs-aufs`` mount. The rest is that program:

    program     the command line, mounting, and becoming a daemon
    server      the loop: reads the kernel's requests, and sees that they are answered
    operations  what the kernel may ask for, one by one
    union       what happens to names: made, removed, renamed, hidden
    jobs        work that is done in threads
    copyup      brings what is in a lower branch into the upper
    tree        the merged directories and files that the kernel knows
    places      directories of the branches, and their descriptors
    dialect     how whiteouts and opaque directories are called on disk
"""
