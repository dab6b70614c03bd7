"""devicemapper: every layer is a thin device with a file system, a child is a thin snapshot of it.

=================  ====================================================================================================
`driver`           what the store calls: `DevicemapperDriver`
`session`          one operation on the pool: lock, what a killed process left, the steps that change the pool
`ledger`           the database of devices: which volume is which thin device, and what is being done to it
`activation`       thin devices as block devices: on demand, and only as long as somebody wants them
`volumefs`         the file systems that a volume can have: ext4 and xfs
`watch`            a thread that has the pool grow in time while others write to it
`usage`            what volumes occupy, as the pool's own metadata say
=================  ====================================================================================================
"""

from layerfs.drivers.devicemapper.driver import DevicemapperDriver

__all__ = ["DevicemapperDriver"]
