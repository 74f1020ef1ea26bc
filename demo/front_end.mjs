// Drives the real ComfyUI front-end in a headless Chromium: makes workflow files and checks that they open cleanly.
// usage: node front_end.mjs URL < request.json > reply.json; environment: CHROMIUM, NODE_PATH (playwright-core).
// request: {build: [{name, api, columns, groups, notes, widgets, models, stamp, picture, muted, whole}]}, {check: [{name, workflow, picture}]},
// {look: [{name, workflow, vue, run, picture}]}. whole: the part that becomes one node, {inside, title, description, aliases, promoted, inputs,
// outputs, app}; the reply to build is {name: {workflow, blueprint}}.
import { createRequire } from 'node:module'
import { readFileSync } from 'node:fs'

const { chromium } = createRequire(import.meta.url)('playwright-core')
const url = process.argv[2]
const request = JSON.parse(readFileSync(0, 'utf8'))

// Runs in the page. Node ids of the description become graph ids in its order.
async function build({ name, api, columns, groups, notes, widgets, models, stamp, muted, whole }) {
  await app.loadApiJson(structuredClone(api), name)
  const graph = app.rootGraph
  const gap = { x: 60, y: 40 }
  const placed = {}
  for (const [id, note] of Object.entries(notes)) {
    const node = LiteGraph.createNode('MarkdownNote')
    node.title = note.title
    graph.add(node)
    node.widgets[0].value = note.text
    node.size = note.size
    node.color = node.bgcolor = undefined
    placed[id] = node
  }
  for (const id of Object.keys(api)) {
    const node = graph.getNodeById(id)
    if (!node) throw new Error(`${name}: no node ${id} (${api[id].class_type}) among ${graph.nodes.map((n) => n.id + n.type)}`)
    node.title = api[id]._meta?.title ?? node.title
    node.properties = { 'Node name for S&R': node.type, cnr_id: stamp.ours.includes(node.type) ? stamp.cnr_id : 'comfy-core' }
    node.properties.ver = stamp.ours.includes(node.type) ? stamp.version : stamp.host_version
    if (models[id]) node.properties.models = models[id]
    if (muted?.includes(id)) node.mode = LiteGraph.NEVER
    for (const [widget, value] of Object.entries(widgets[id] ?? {})) node.widgets.find((w) => w.name === widget).value = value
    placed[id] = node
  }
  function lay(columns, x) {
    for (const column of columns) {
      let y = 0
      const width = Math.max(...column.map((id) => notes[id]?.size[0] ?? Math.max(placed[id].computeSize()[0], 300)))
      for (const id of column) {
        const node = placed[id]
        node.pos = [x, y]
        if (!notes[id]) {
          const text = node.widgets?.filter((w) => w.options?.multiline || w.type === 'customtext').length ?? 0
          const preview = ['LoadImage', 'SaveVideo'].includes(node.type) ? 220 : node.type === 'OpenSoraRectifiedFlowSampler' ? 120 : 0
          const told = node.widgets?.some((w) => w.name === 'length') || node.type === 'OpenSoraT5TextEncode' ? 34 : 0 // web/js/open_sora.js
          node.size = [width, node.computeSize()[1] + text * 60 + preview + told]
        }
        y += node.size[1] + gap.y + LiteGraph.NODE_TITLE_HEIGHT
      }
      x += width + gap.x
    }
  }
  lay(columns, 0)
  const boxes = []
  for (const [title, ids] of Object.entries(groups ?? {})) {
    const group = new LiteGraph.LGraphGroup(title)
    graph.add(group)
    boxes.push(group)
    // Its own resizeTo asks for where nodes were drawn, and nothing is drawn yet.
    const nodes = ids.map((id) => placed[id])
    const margin = gap.x / 3
    const left = Math.min(...nodes.map((node) => node.pos[0])) - margin
    const top = Math.min(...nodes.map((node) => node.pos[1])) - LiteGraph.NODE_TITLE_HEIGHT - margin - group.titleHeight
    group.pos = [left, top]
    group.size = [
      Math.max(...nodes.map((node) => node.pos[0] + node.size[0])) + margin - left,
      Math.max(...nodes.map((node) => node.pos[1] + node.size[1])) + margin - top
    ]
  }
  let blueprint
  const extra = { ds: { scale: 0.75, offset: [150, 120] } }
  if (whole) {
    const inside = whole.inside.map((id) => placed[id])
    const { subgraph, node } = graph.convertToSubgraph(new Set([...inside, ...boxes]))
    subgraph.name = node.title = whole.title
    subgraph.extra = { BlueprintDescription: whole.description, BlueprintSearchAliases: whole.aliases }
    node.properties = { ...node.properties, cnr_id: stamp.cnr_id, ver: stamp.version }
    for (const [was, now] of Object.entries(whole.inputs ?? {})) subgraph.renameInput(subgraph.inputs.find((input) => input.name === was), now)
    whole.outputs.forEach((label, at) => subgraph.renameOutput(subgraph.outputs[at], label))
    const already = subgraph.inputs.filter((input) => input._widget || node.inputs.find((slot) => slot.name === input.name)?.widget)
    for (const input of already) subgraph.removeInput(input)
    for (const [id, widget, label] of whole.promoted) {
      const part = subgraph.getNodeById(id)
      const slot = part.inputs.find((input) => input.widget?.name === widget)
      subgraph.addInput(label ?? widget, String(slot.type)).connect(slot, part)
    }
    placed.whole = node
    const text = whole.promoted.filter(([id, widget]) => placed[id].widgets.find((w) => w.name === widget).element).length
    node.size = [480, Math.max(node.computeSize()[1], 200) + text * 70]
    const serialized = app.canvas._serializeItems([node])
    const form = { revision: 0, version: 0.4, config: {}, extra: {}, groups: [], links: [], last_link_id: 0, last_node_id: node.id }
    const alone = structuredClone(serialized.nodes[0])
    for (const slot of alone.inputs) slot.link = null
    for (const slot of alone.outputs) slot.links = []
    alone.pos = [0, 0]
    blueprint = { ...form, nodes: [alone], definitions: { subgraphs: structuredClone(serialized.subgraphs) } }
    if (whole.app) {
      extra.linearMode = true
      extra.linearData = { inputs: whole.promoted.map(([, widget, label]) => [String(node.id), label ?? widget]), outputs: whole.shown.map(String) }
    }
    let x = 0
    for (const column of whole.canvas ?? []) {
      let y = 0
      const width = Math.max(...column.map((id) => placed[id].size[0]))
      for (const id of column) {
        if (placed[id].type === 'SaveVideo') placed[id].size = [420, 420]
        placed[id].pos = [x, y]
        y += placed[id].size[1] + gap.y + LiteGraph.NODE_TITLE_HEIGHT
      }
      x += Math.max(width, ...column.map((id) => placed[id].size[0])) + gap.x
    }
  }
  const workflow = graph.serialize()
  workflow.extra = extra
  return { workflow, blueprint }
}

async function check({ workflow }) {
  await app.loadGraphData(structuredClone(workflow), true, false)
  const nodes = app.rootGraph.nodes
  const known = (node) => node.isSubgraphNode?.() || node.type in LiteGraph.registered_node_types
  return {
    api: (await app.graphToPrompt()).output,
    missing: nodes.filter((node) => !known(node)).map((node) => node.type),
    broken: nodes.filter((node) => node.has_errors).map((node) => node.type),
    links: app.rootGraph.links.size ?? Object.keys(app.rootGraph.links).length,
    widgets: Object.fromEntries(nodes.map((node) => [node.id, (node.widgets ?? []).map((widget) => [widget.name, widget.value])]))
  }
}

// Opens a file as the template browser does and says what a person would see.
async function look({ workflow, vue }) {
  await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', Boolean(vue))
  await app.loadGraphData(structuredClone(workflow), true, true, 'look', { openSource: 'template' })
  await new Promise((done) => setTimeout(done, 1500))
  const box = (node) => [...node.pos, node.pos[0] + node.size[0], node.pos[1] + node.size[1]]
  return {
    scale: app.canvas.ds.scale,
    is_low_quality: Boolean(app.canvas.low_quality),
    boxes: app.rootGraph.nodes.map((node) => [node.title, ...box(node)]),
    broken: app.rootGraph.nodes.filter((node) => node.has_errors).map((node) => node.type)
  }
}

const browser = await chromium.launch({ executablePath: process.env.CHROMIUM, args: ['--no-sandbox'] })
const errors = []

async function open() {
  const page = await browser.newPage({ viewport: { width: 1600, height: 900 }, locale: request.locale ?? 'en-US' })
  page.on('pageerror', (error) => errors.push(String(error)))
  // A resource that is not there (a user's style sheet) is not an error of a workflow.
  page.on('console', (message) => {
    if (message.type() === 'error' && !/Failed to load resource|before initialization/.test(message.text())) errors.push(message.text())
  })
  await page.goto(url)
  await page.waitForFunction(() => window.app?.extensionManager && window.app?.canvas?.graph && 'OpenSoraModelLoader' in (window.LiteGraph?.registered_node_types ?? {}) && app.extensionManager.workflow?.activeWorkflow, null, { timeout: 120000 })
  await page.waitForTimeout(1500) // the graph that it opens with comes last, over whatever is there
  await page.evaluate(async (body) => {
    for (const [id, value] of Object.entries(body)) await app.extensionManager.setting.set(id, value)
  }, request.settings ?? {})
  await page.keyboard.press('Escape') // a new user's first page begins with the template browser
  return page
}

try {
  const reply = {}
  const steps = { build: String(build), check: String(check), look: String(look) }
  const [kind] = Object.keys(steps).filter((name) => name in request)
  let page = await open()
  for (const [index, job] of request[kind].entries()) {
    // The front-end remembers widgets by their node's id: a graph made after another would take its values where it names none.
    if (index && !request.check) {
      await page.close()
      page = await open()
    }
    errors.length = 0
    reply[job.name] = await page.evaluate(`(${steps[kind]})(${JSON.stringify(job)})`)
    // What a test does and asks after that, in the page: [expression, seconds to wait before, picture to take after].
    for (const [expression, seconds, picture] of job.then ?? []) {
      await page.waitForTimeout(seconds * 1000)
      reply[job.name].then = [...(reply[job.name].then ?? []), await page.evaluate(expression)]
      if (picture) await page.screenshot({ path: picture })
    }
    if (job.picture) await page.screenshot({ path: job.picture })
    if (!request.build) reply[job.name].errors = [...errors]
  }
  process.stdout.write(JSON.stringify(reply))
} finally {
  await browser.close()
}
