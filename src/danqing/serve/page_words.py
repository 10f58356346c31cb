"""The words of the page, in English and Chinese."""

from __future__ import annotations

LANGUAGES = {"en": "English", "zh": "中文"}

WORDS: dict[str, tuple[str, str]] = {
    "prompt": ("Prompt", "提示词"),
    "prompt_hint": (
        "three blue mountains under a red sun, a boat on the water",
        "three blue mountains under a red sun, a boat on the water（英文描述效果最好）",
    ),
    "negative": ("Negative prompt", "反向提示词"),
    "images": ("Images to edit (drop them here)", "待编辑的图像（拖放到此处）"),
    "model": ("Model", "模型"),
    "width": ("Width", "宽"),
    "height": ("Height", "高"),
    "steps": ("Steps", "采样步数"),
    "guidance": ("Guidance scale", "引导系数"),
    "count": ("Images", "图像数量"),
    "seed": ("Seed", "随机种子"),
    "lock": ("Keep the seed", "固定随机种子"),
    "dice": ("New seed", "换一个随机种子"),
    "paint": ("Generate  (Enter)", "生成（回车）"),
    "cancel": ("Cancel  (Esc)", "取消（Esc）"),
    "preview": ("In progress", "生成中"),
    "pictures": ("Images of this session", "本次会话的图像"),
    "record": ("Record in the image file", "图像文件中的记录"),
    "again": ("Use these settings", "使用相同参数"),
    "left": ("Compare: left", "对比：左"),
    "right": ("Compare: right", "对比：右"),
    "compared": ("Left and right", "左右对比"),
    "waiting": ("{count} ahead in the queue", "队列中前面还有 {count} 个任务"),
    "begun": ("Starting", "开始"),
    "step": ("image {picture} of {count}: step {done} of {total}",
             "第 {picture}/{count} 张图像：第 {done}/{total} 步"),
    "loading": ("reading {item}", "正在读取 {item}"),
    "done": ("{count} in {seconds:.1f} s", "完成 {count} 张，用时 {seconds:.1f} 秒"),
    "cancelled": ("Cancelled", "已取消"),
    "failed": ("Failed: {what}", "失败：{what}"),
    "same": ("identical pixels", "像素完全相同"),
    "measures": ("PSNR {psnr:.2f} dB, SSIM {ssim:.4f}, largest difference {largest} of 255",
                 "PSNR {psnr:.2f} dB，SSIM {ssim:.4f}，最大差值 {largest}/255"),
    "sizes_differ": ("different sizes: cannot be compared", "两张图像尺寸不同，无法比较"),
    "choose": ("Choose an image of the gallery first", "请先在图库中选择一张图像"),
    "free": ("{free} of {total} free", "空闲 {free}，共 {total}"),
}  # fmt: skip


def word(language: str, name: str, **values: object) -> str:
    """Return a text of the page in a language."""
    return WORDS[name][list(LANGUAGES).index(language)].format(**values)
