"""Published vision transformers as models of transformers: from AutoModel, from timm, from the files of their code."""
