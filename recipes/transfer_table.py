"""Initialisations compared by what they are good for elsewhere: each through detection and segmentation, and one table of all.

    deepspeed recipes/transfer_table.py --coco COCO --ade20k ADEChallengeData2016 \
        --encoders torchvision/resnet50@random torchvision/resnet50@library runs/resnet50_imagenet-001 torchvision/resnet50@resnet50.pth
    ... --detection steps=90000 optim.lr=0.04 --segmentation head=linear frozen --jobs 2
    ... the same command again                 goes on where it was stopped, and tries again what failed

Each run is one of coco_detection.py or ade20k_segmentation.py, whose headers tell the protocols; --detection and --segmentation give them
options. NAME@library is the control, the supervised weights of the library. ViTs want options of their own (coco_detection_vit.py,
ade20k_segmentation.py): give them a table of their own, --out runs/transfer_vit.
Without arguments: a random and a briefly pretrained toy encoder on built-in scenes.

To be compared with, ResNet-50 pretrained on ImageNet for 1,000 epochs, Mask R-CNN 1x on COCO (arXiv:2105.04906, table 2), not run here:

                  box AP      mask AP
    supervised    39.0        35.4        (38.6 / 35.2 in detectron2's model zoo, with frozen BatchNorm)
    MoCo v2       39.8        36.1
    VICReg        39.4        36.4        (users report 38.0 for the box AP)

Source of every number: the recipes that it runs. Expected: the toy table says nothing; on CamVid: recipes/LOG.md.
"""

from vicreg_mm.study.transfers import TransferTable, main

CONFIG = TransferTable(name="transfer_table")

if __name__ == "__main__":
    main(CONFIG)
