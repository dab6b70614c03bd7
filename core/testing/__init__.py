"""For the authors of drivers: the conformance suite that every driver has to pass.

In a test module of your own project::

    from layerfs.testing import DriverConformance

    class TestMyDriver(DriverConformance):
        driver_class = MyDriver
        filesystem = "xfs"      # the backing to test on; "dir" is any plain directory

pytest then collects every check. It needs pytest, and what the backing needs (usually root).
"""

from layerfs.testing.conformance import DriverConformance
from layerfs.testing.trees import Tree, read_tree

__all__ = ["DriverConformance", "Tree", "read_tree"]
