"""aufs: a union of many branches in user space, with aufs' on-disk format, served to the kernel over FUSE.

`driver` is what the store uses; it has the kernel or the program ``layerfs-aufs`` mount. The rest is that program:

    program   the command line, mounting, and becoming a daemon
    server    reads the kernel's requests and answers them
    union     what each operation does to names and files
    copyup    brings what is in a lower branch into the upper
    tree      the merged directories and files that the kernel knows
    places    directories of the branches, and their descriptors
    dialect   how whiteouts and opaque directories are called on disk
"""
