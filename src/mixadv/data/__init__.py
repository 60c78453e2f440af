"""Images as batches: CIFAR-10, folders of images, and the embedded digits.

Every data set is one file with one subclass of `mixadv.data.base.ImageDataModule`, plus one file in `conf/data`.
"""
