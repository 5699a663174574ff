"""Images to fold checkpoints and out-of-fold scores: a plain PyTorch AMP loop over timm backbones."""
