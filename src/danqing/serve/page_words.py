"""The words of the page, in English and Chinese."""

from __future__ import annotations

LANGUAGES = {"en": "English", "zh": "中文"}

WORDS: dict[str, tuple[str, str]] = {
    "title": ("danqing", "丹青"),
    "prompt": ("What to paint", "描述画面"),
    "prompt_hint": (
        "three blue mountains under a red sun, a boat on the water",
        "three blue mountains under a red sun, a boat on the water（英文描述效果最好）",
    ),
    "negative": ("What to keep out", "不希望出现的内容"),
    "images": ("Pictures to edit (drop them here)", "待编辑的图片（拖放到此处）"),
    "model": ("Model", "模型"),
    "width": ("Width", "宽"),
    "height": ("Height", "高"),
    "steps": ("Steps", "步数"),
    "guidance": ("Guidance", "引导强度"),
    "count": ("Pictures", "张数"),
    "seed": ("Seed", "种子"),
    "lock": ("Keep the seed", "固定种子"),
    "dice": ("New seed", "换一个种子"),
    "paint": ("Paint  (Enter)", "开始绘制（回车）"),
    "cancel": ("Cancel  (Esc)", "取消（Esc）"),
    "preview": ("In progress", "绘制中"),
    "pictures": ("Pictures of this session", "本次会话的图片"),
    "record": ("The record inside the picture", "图片内含的记录"),
    "again": ("Same again", "用相同设置再画"),
    "left": ("Compare: left", "对比：左"),
    "right": ("Compare: right", "对比：右"),
    "compared": ("Left and right", "左右对比"),
    "settings": ("Settings", "参数"),
    "waiting": ("{count} before it in the queue", "前面还有 {count} 个任务"),
    "begun": ("It begins", "开始"),
    "step": ("picture {picture} of {count}: step {done} of {total}",
             "第 {picture}/{count} 张：第 {done}/{total} 步"),
    "loading": ("reading {item}", "正在读取 {item}"),
    "done": ("{count} in {seconds:.1f} s", "完成 {count} 张，用时 {seconds:.1f} 秒"),
    "cancelled": ("Cancelled", "已取消"),
    "failed": ("It failed: {what}", "失败：{what}"),
    "same": ("the same pixels", "像素完全相同"),
    "measures": ("PSNR {psnr:.2f} dB, SSIM {ssim:.4f}, largest difference {largest} of 255",
                 "PSNR {psnr:.2f} dB，SSIM {ssim:.4f}，最大差值 {largest}/255"),
    "sizes_differ": ("the two differ in size: no measures", "两张图尺寸不同，无法计算指标"),
    "choose": ("Choose a picture of the gallery first", "请先在图库中选择一张图片"),
    "free": ("{free} of {total} free", "空闲 {free}，共 {total}"),
    "language": ("Language", "语言"),
}  # fmt: skip


def word(language: str, name: str, **values: object) -> str:
    """Return a text of the page in a language."""
    return WORDS[name][list(LANGUAGES).index(language)].format(**values)
