"""What a pretrained encoder is good for elsewhere: detection and segmentation, on the engine that pretrains."""
