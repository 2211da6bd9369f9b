import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # training/ is no installed package

pytest.importorskip("torch", reason="training needs the extra 'export'")
pytest.importorskip("diffusers", reason="training needs the extra 'export'")
