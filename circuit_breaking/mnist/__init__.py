"""What the MNIST scripts share: images, run folders, reports."""
