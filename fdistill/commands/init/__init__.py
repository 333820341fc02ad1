"""`fdistill init`: five answers become a config whose comments say why each setting has its value."""
